"""Other people's ways to load the same shards: what `tools.benchmark data` compares with.

Each pipeline draws the same boxes as ours and ends in a plain torch DataLoader.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.images.crops import random_box
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.rng import sample_rng
from data_pipeline.samples.labels import NO_LABEL

TEXT_LENGTH = 40


class Peers:
    """Pipelines over one set of shards.

    Args:
        urls: tar files.
        image: size, crop, flip, mean and std.
        encode: text -> token ids.
        collate: list of samples -> batch, for the pipelines without a form of their own.
        batch, workers: of the loader.
    """

    def __init__(
        self,
        urls: list[str],
        image: ImageSettings,
        encode: Callable[[str], list[int]],
        collate: Callable[[list[dict[str, Any]]], Any],
        batch: int,
        workers: int,
    ) -> None:
        self.urls, self.image, self.encode, self.collate = urls, image, encode, collate
        self.batch, self.workers = batch, workers

    def webdataset(self, decode: Callable[[dict], Any]):
        """Loader of a webdataset pipeline with shard shuffle and a buffer of 1,000 samples."""
        import webdataset

        pipeline = (
            webdataset.WebDataset(self.urls, shardshuffle=len(self.urls), empty_check=False)
            .shuffle(1000)
            .map(decode)
            .batched(self.batch, collation_fn=self.collate, partial=True)
        )
        return self._loader(pipeline)

    def open_clip_style(self):
        """Loader as open_clip builds it: a buffer of 5,000 samples, webdataset's own decoding to
        Pillow images, float32 tensors normalised in the workers."""
        import webdataset

        pipeline = (
            webdataset.WebDataset(self.urls, shardshuffle=len(self.urls), empty_check=False)
            .shuffle(5000, initial=1000)
            .decode("pilrgb")
            .rename(image="jpg", text="txt")
            .map_dict(text=self._tokens)
            .map(self._normalised)
            .to_tuple("image", "text")
            .batched(self.batch, partial=True)
        )
        return self._loader(pipeline)

    def decode_pillow(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Decode, crop and resize (bicubic) with Pillow; one caption."""
        with Image.open(io.BytesIO(sample["jpg"])) as opened:
            picture = self._cropped(opened.convert("RGB"), int(sample["__key__"]))
        return {
            "images": np.asarray(picture),
            "captions": [sample["txt"].decode()],
            "prompt_class": NO_LABEL,
        }

    def _cropped(self, picture: Image.Image, key: int) -> Image.Image:
        rng = sample_rng(0, "bench", key, "image")
        x, y, w, h = random_box(*picture.size, self.image.scale, self.image.ratio, rng)
        side = (self.image.size, self.image.size)
        picture = picture.resize(side, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
        if rng.random() < self.image.flip_probability:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture

    def _normalised(self, sample: dict[str, Any]) -> dict[str, Any]:
        pixels = np.array(self._cropped(sample["image"], int(sample["__key__"])))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.image.mean, self.image.std))
        return {**sample, "image": image.sub_(mean).div_(std)}

    def _tokens(self, text: str) -> np.ndarray:
        tokens = np.zeros(TEXT_LENGTH, dtype=np.int64)
        ids = self.encode(text)[: TEXT_LENGTH - 2]
        tokens[1 : 1 + len(ids)] = ids
        return tokens

    def _loader(self, pipeline) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            pipeline, batch_size=None, num_workers=self.workers, prefetch_factor=2
        )
