"""All kinds of encoders, objectives and data that a recipe may name by `type`.

A new one is its own file and one line here: every class of settings that is imported below, and
whose `type` is said, is among them.
"""
# ruff: noqa: F401

from typing import Literal, get_origin

from data_pipeline.samples.boxes import BoxDataSettings
from data_pipeline.samples.captions import CaptionDataSettings
from data_pipeline.samples.labels import LabelDataSettings
from data_pipeline.samples.pictures import PictureDataSettings
from data_pipeline.samples.sample_processor import DataSettings
from data_pipeline.samples.text import TextDataSettings
from data_pipeline.samples.views_texts_labels import M3IDataSettings
from pretrain.models.backbones.settings import ResNetSettings, SwinSettings
from pretrain.models.bert.settings import BertSettings
from pretrain.models.encoder_settings import EncoderSettings
from pretrain.models.general.settings import GeneralDecoderSettings, PatchesSettings
from pretrain.models.internimage.settings import InternImageSettings
from pretrain.models.text_settings import TextEncoderSettings
from pretrain.models.vit_settings import VitSettings
from pretrain.objectives.captioning.settings import CaptioningSettings
from pretrain.objectives.classification_settings import ClassificationSettings
from pretrain.objectives.contrastive.settings import ContrastiveSettings
from pretrain.objectives.m3i.settings import M3ISettings
from pretrain.objectives.objective_settings import ObjectiveSettings
from pretrain.objectives.unified.settings import (
    UnifiedCaptionSettings,
    UnifiedClassificationSettings,
    UnifiedMlmSettings,
    UnifiedRetrievalSettings,
)


def _kinds(base: type) -> tuple[type, ...]:
    found = {
        value: None
        for value in globals().values()
        if isinstance(value, type)
        and issubclass(value, base)
        and get_origin(value.model_fields["type"].annotation) is Literal
    }
    return tuple(found)


ENCODERS = _kinds(EncoderSettings)
OBJECTIVES = _kinds(ObjectiveSettings)
DATA = _kinds(DataSettings)
