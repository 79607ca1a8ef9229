"""The proposal network: selection, refinement, known boxes, tokens."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.build_context import BuildContext
from pretrain.models.encoder import Encoder
from pretrain.models.init import initialise
from pretrain.models.regions.boxes import anchors, boxes_of_masks, inverse_sigmoid
from pretrain.models.regions.decoder import KnownBoxes
from pretrain.models.regions.encoder import averaging, bilinear, resized
from pretrain.models.regions.settings import RegionSettings
from pretrain.models.vit import VisionTransformer
from tests.pretrain.models.internimage.internimage_models import small_encoder
from tests.pretrain.models.regions.region_models import (
    CANVAS,
    CHANNELS,
    SMALL,
    maps_of,
    small_regions,
)

SIZES = torch.tensor([[64, 96], [40, 56]])


def known_boxes() -> KnownBoxes:
    generator = torch.Generator().manual_seed(7)
    groups = torch.tensor([[0, 0, 1, 1, -1], [0, 1, 2, 3, 4]])
    return KnownBoxes(torch.rand(2, 5, 4, generator=generator) * 0.3 + 0.3, groups)


def test_known_boxes_never_change_what_is_found():
    model, maps = small_regions(), maps_of(2)
    with torch.no_grad():
        alone = model(maps, CANVAS, SIZES)
        beside = model(maps, CANVAS, SIZES, known_boxes())
    assert alone.denoising == [] and len(beside.denoising) == 4 and len(alone.predictions) == 5
    for first, second in zip(alone.predictions, beside.predictions, strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_groups_of_known_boxes_do_not_see_each_other():
    model, maps, known = small_regions(), maps_of(2), known_boxes()
    other = known._replace(boxes=known.boxes.clone())
    other.boxes[0, 2:4] = 0.4  # the second group of the first image
    with torch.no_grad():
        a, b = (model(maps, CANVAS, SIZES, each).denoising[-1].boxes for each in (known, other))
    torch.testing.assert_close(a[0, :2], b[0, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(a[1], b[1], atol=1e-6, rtol=0)
    assert (a[0, 2:4] - b[0, 2:4]).abs().max() > 1e-4


def test_the_best_places_become_queries_with_boxes_around_their_masks():
    model, maps = small_regions(), maps_of(2)
    decoder = model.predictor
    with torch.no_grad():
        memory = model.pixel_decoder(maps, CANVAS, SIZES)
        regions = decoder(memory)
        # One place after the other.
        places, usable = anchors(memory.sizes, torch.device("cpu"))
        for image in range(2):
            found = []
            for place, token in enumerate(memory.tokens[image]):
                if usable[place] and memory.present[image, place]:
                    out = decoder.enc_output_norm(decoder.enc_output(token))
                    found.append((decoder.class_embed(out).item(), place, out))
            found.sort(key=lambda one: -one[0])
            for query, (_, place, out) in enumerate(found[: decoder.queries]):
                box = (decoder.bbox_embed(out) + inverse_sigmoid(places[place])).sigmoid()
                close = {"atol": 1e-5, "rtol": 1e-4}
                selected, first = (each.boxes[image, query] for each in regions.predictions[:2])
                torch.testing.assert_close(selected, box, **close)
                mask = regions.predictions[0].masks(memory.mask_features)[image, query] > 0
                shown, some = boxes_of_masks(mask)
                torch.testing.assert_close(first, shown if some else box, **close)


def test_contents_are_detached_and_everything_else_learns():
    model, maps = small_regions(), maps_of(2)
    memory = model.pixel_decoder(maps, CANVAS, SIZES)
    regions = model.predictor(memory, known_boxes())
    late = sum(part.float().sum() for p in regions.predictions[2:] for part in p)
    gradient = torch.autograd.grad(
        late, model.predictor.enc_output.weight, allow_unused=True, retain_graph=True
    )
    assert gradient == (None,)
    tokens = model.image_tokens(maps, regions, CANVAS, SIZES)
    every = [*regions.predictions, *regions.denoising]
    (sum(part.sum() for p in every for part in p) + tokens.tokens.square().sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_refinement_looks_forward_twice():
    """A layer's boxes move the boxes of the layer before, which then learn from it, too; but no
    further back."""
    model, maps = small_regions(), maps_of(2)
    with torch.no_grad():
        memory = model.pixel_decoder(maps, CANVAS)
    regions = model.predictor(memory)
    layers = model.predictor.decoder["layers"]
    weights = [layer.linear2.weight for layer in layers]
    # Contents tie all layers together; cut them, and boxes alone are left.
    undo = [
        layer.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
        for layer in layers
    ]
    regions = model.predictor(memory)
    for handle in undo:
        handle.remove()
    grads = torch.autograd.grad(regions.predictions[-1].boxes.sum(), weights, allow_unused=True)
    assert grads[0] is None and grads[1].any() and grads[2].any()


def test_padding_is_neither_read_nor_proposed():
    model, maps = small_regions(), maps_of(2)
    with torch.no_grad():
        memory = model.pixel_decoder(maps, CANVAS, SIZES)
        noise = torch.randn(memory.tokens.shape, generator=torch.Generator().manual_seed(3))
        other = memory._replace(tokens=torch.where(memory.present[..., None], memory.tokens, noise))
        found, same = model.predictor(memory), model.predictor(other)
    torch.testing.assert_close(found.contents, same.contents)
    assert found.predictions[0].boxes.isfinite().all()


@pytest.mark.parametrize(
    "levels, stride, places",
    [
        (3, 8, 126),
        (4, 8, 128),
        (5, 8, 129),
        (3, 4, 504),
        (4, 4, 510),
        (5, 4, 512),
    ],
)
def test_three_to_five_maps(levels, stride, places):
    model = small_regions(levels=levels, finest_stride=stride)
    with torch.no_grad():
        memory = model.pixel_decoder(maps_of(1), CANVAS)
    assert memory.tokens.shape == (1, places, 32) and len(memory.sizes) == levels
    assert memory.sizes[0] == (CANVAS[0] // stride, CANVAS[1] // stride)
    assert memory.mask_features.shape == (1, 16, 24, 32)
    assert model.pixel_decoder.places([(64 // s, 96 // s) for s in (4, 8, 16, 32)]) == places


def test_fewer_places_than_queries_are_named():
    with pytest.raises(ValueError, match="128 places for 200 queries: lower `queries`"):
        small_regions(queries=200)(maps_of(1), CANVAS)


def test_boxes_stay_float32_beside_bfloat16_weights():
    """In bfloat16 neighbouring fractions near 1 are 1 / 256 apart."""
    model, maps = small_regions().bfloat16(), [x.bfloat16() for x in maps_of(1)]
    with torch.no_grad():
        regions = model(maps, CANVAS)
    for prediction in regions.predictions:
        assert prediction.boxes.dtype == torch.float32
        assert prediction.logits.dtype == torch.bfloat16
    assert (regions.predictions[-1].boxes != regions.predictions[-1].boxes.bfloat16()).any()


def test_recomputation_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = small_regions(gradient_checkpointing=recompute)
        regions = model(maps_of(1), CANVAS, None, None)
        sum(part.square().sum() for p in regions.predictions for part in p).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_tokens_are_meaning_place_and_look():
    model, maps = small_regions(), maps_of(2)
    with torch.no_grad():
        regions = model(maps, CANVAS, SIZES)
        found = model.image_tokens(maps, regions, CANVAS, SIZES)
        last, tokens = regions.predictions[-1], model.tokens
        assert found.tokens.shape == (2, 2 + 6 + 8, 40)
        assert found.present.sum(1).tolist() == [16, 14]  # 2 x 2 of 2 x 3 in the second
        assert found.present.shape == found.tokens.shape[:2]
        masks = last.masks(regions.mask_features)
        for image in range(2):
            order = last.logits[image, :, 0].argsort(descending=True)[:8]
            assert order.tolist() == found.chosen[image].tolist()
            for place, query in enumerate(order):
                y_x_w_h = last.boxes[image, query][[1, 0, 2, 3]] * (2 * torch.pi)
                waves = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
                angles = y_x_w_h[:, None] * waves
                code = torch.stack([angles.sin(), angles.cos()], -1).flatten()
                look = F.adaptive_avg_pool2d(masks[image, query][None, None], 28).flatten()
                right = (
                    tokens.semantic(regions.contents[image, query])
                    + tokens.box(code)
                    + tokens.mask(look)
                )
                torch.testing.assert_close(
                    found.tokens[image, 8 + place], right, atol=1e-5, rtol=1e-4
                )
        alone = maps[-1][1:, :, :2].flatten(1, 2)  # the second image without its padding
        for number, pool in enumerate(tokens.pools):
            torch.testing.assert_close(found.tokens[1:, number], pool(alone), atol=1e-5, rtol=1e-4)


def test_maps_are_resized_as_by_torch():
    x = maps_of(2)[1]
    channels_first = x.permute(0, 3, 1, 2)
    for new in ((16, 24), (3, 5)):
        right = F.interpolate(channels_first, new, mode="bilinear", align_corners=False)
        torch.testing.assert_close(
            resized(x, new, bilinear), right.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5
        )
    for new in ((28, 28), (3, 5)):
        right = F.adaptive_avg_pool2d(channels_first, new).permute(0, 2, 3, 1)
        torch.testing.assert_close(resized(x, new, averaging), right, atol=1e-5, rtol=1e-5)


def test_flops_are_those_of_a_pass():
    model, maps = small_regions(), maps_of(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        known = KnownBoxes(torch.full((1, 5, 4), 0.4), torch.zeros(1, 5, dtype=torch.int64))
        regions = model(maps, CANVAS, None, known)
        model.image_tokens(maps, regions, CANVAS)
    flops = model.flops(*CANVAS, known=5)
    # The counter leaves out fused attention on CPUs; the masks of known boxes are no part of it.
    assert counter.get_total_flops() == pytest.approx(flops, rel=0.01)


def test_names_are_those_of_mask_dino():
    names = set(small_regions().state_dict())
    for name in (
        "pixel_decoder.input_proj.3.0.weight",
        "pixel_decoder.input_proj.0.1.bias",
        "pixel_decoder.transformer.level_embed",
        "pixel_decoder.transformer.encoder.layers.1.self_attn.sampling_offsets.bias",
        "pixel_decoder.transformer.encoder.layers.0.linear1.weight",
        "pixel_decoder.adapter_1.weight",
        "pixel_decoder.adapter_1.norm.weight",
        "pixel_decoder.layer_1.norm.bias",
        "pixel_decoder.mask_features.bias",
        "predictor.enc_output.weight",
        "predictor.enc_output_norm.weight",
        "predictor.label_enc.weight",
        "predictor.class_embed.bias",
        "predictor.mask_embed.layers.2.weight",
        "predictor.bbox_embed.layers.2.bias",
        "predictor.decoder_norm.weight",
        "predictor.decoder.ref_point_head.layers.1.weight",
        "predictor.decoder.layers.2.self_attn.in_proj_weight",
        "predictor.decoder.layers.2.self_attn.out_proj.weight",
        "predictor.decoder.layers.2.cross_attn.value_proj.weight",
        "predictor.decoder.layers.2.norm3.weight",
    ):
        assert name in names


def test_a_model_without_storage_gets_every_value():
    with torch.device("meta"):
        model = RegionSettings(**SMALL).over(CHANNELS)
    model.to_empty(device="cpu")
    initialise(model, 3)
    expected = RegionSettings(**SMALL).over(CHANNELS)
    initialise(expected, 3)
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name
    # What looks like an object at first is rare, and boxes do not move.
    assert model.predictor.class_embed.bias.sigmoid().item() == pytest.approx(0.01)
    assert not model.predictor.bbox_embed.layers[-1].weight.any()


def test_settings_say_what_does_not_fit():
    with pytest.raises(ValidationError, match=r"heads .3. must divide width .256."):
        RegionSettings(heads=3)
    with pytest.raises(ValidationError, match=r"kept .200. must not be above queries .100."):
        RegionSettings(queries=100)
    with pytest.raises(ValueError, match=r"pool_heads .16. must divide the 40 channels"):
        RegionSettings().over((16, 24, 32, 40))
    with pytest.raises(ValueError, match="two maps or more"):
        RegionSettings().over((768,))


def test_a_backbone_above_it_gives_the_maps():
    backbone = small_encoder()
    context = BuildContext({"eye": backbone})
    model = RegionSettings(**SMALL, of="eye").build(context)
    initialise(model, 0)
    images = torch.randn(2, 3, *CANVAS, generator=torch.Generator().manual_seed(0))
    maps = backbone.encode(images, ["maps"]).maps
    regions = model(maps, CANVAS)
    tokens = model.image_tokens(maps, regions, CANVAS).tokens
    # 2 pools, the 2 x 3 places of the last map, 8 regions.
    assert tokens.shape == (2, 2 + 6 + 8, model.width) and isinstance(model, Encoder)
    tokens.square().sum().backward()
    assert all(one.grad is not None for one in backbone.parameters())
    # Every parameter belongs to one layer, by which the optimizer's rates go.
    for name, _ in model.named_parameters():
        owners = [part for layer in model.layer_names() for part in layer]
        assert sum(name.startswith(f"{part}.") for part in owners) == 1, name


def test_a_backbone_without_fine_maps_is_refused():
    context = BuildContext({"image": VisionTransformer(32, 8, 24, 2, 2)})
    with pytest.raises(ValueError, match=r"of: image gives maps of strides \[8\].*internimage"):
        RegionSettings(**SMALL).build(context)
