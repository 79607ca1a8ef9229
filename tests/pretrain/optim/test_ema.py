"""The decay of the moving average."""

import pytest
from pydantic import ValidationError

from pretrain.optim.ema import EmaSettings, decay_at


def test_warmup_rises_to_the_decay_and_stays():
    settings = EmaSettings(decay=0.99)
    values = [decay_at(update, settings) for update in range(2000)]
    assert values[0] == 0.1
    assert values[10] == 11 / 20
    assert values == sorted(values) and values[-1] == 0.99
    assert values.index(0.99) == 890  # (1 + t) / (10 + t) = 0.99


def test_without_warmup_the_decay_is_constant():
    settings = EmaSettings(decay=0.5, warmup=False)
    assert {decay_at(update, settings) for update in range(10)} == {0.5}


def test_the_first_weights_are_forgotten():
    """With the warm-up an average that starts from zero reaches a constant within 1 %."""
    settings, average = EmaSettings(decay=0.9999), 0.0
    for update in range(50):
        decay = decay_at(update, settings)
        average = decay * average + (1 - decay)
    assert average > 0.99


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decay_is_a_share(decay):
    with pytest.raises(ValidationError):
        EmaSettings(decay=decay)
