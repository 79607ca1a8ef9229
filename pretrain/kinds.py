"""All kinds of encoders, objectives and data that a recipe may name by `type`.

A new one is its own file and one line here: every class of settings that is imported below, and
whose `type` is said, is among them.
"""
# ruff: noqa: F401

from typing import Literal, get_origin

from data_pipeline.boxes import BoxDataSettings
from data_pipeline.captions import CaptionDataSettings
from data_pipeline.labels import LabelDataSettings
from data_pipeline.m3i import M3IDataSettings
from data_pipeline.pictures import PictureDataSettings
from data_pipeline.sample_processor import DataSettings
from data_pipeline.text import TextDataSettings
from pretrain.models.encoder_settings import EncoderSettings
from pretrain.models.internimage_settings import InternImageSettings
from pretrain.models.text_settings import TextEncoderSettings
from pretrain.models.vit_settings import VitSettings
from pretrain.objectives.captioning_settings import CaptioningSettings
from pretrain.objectives.classification_settings import ClassificationSettings
from pretrain.objectives.contrastive_settings import ContrastiveSettings
from pretrain.objectives.m3i import M3ISettings
from pretrain.objectives.objective_settings import ObjectiveSettings


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
