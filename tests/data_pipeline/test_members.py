"""What is said where a sample lacks a member."""

import pytest

from data_pipeline.members import AbsentValue, MemberSource
from data_pipeline.reader import Sample


def sample(**members: bytes) -> Sample:
    named = {name.replace("_", "."): data for name, data in members.items()}
    return Sample(0, "dots.tar", "shot", named)


def test_files_that_became_one_sample_by_their_dots_are_named():
    dotted = sample(**{f"2023_{n:02d}_{e}": b"x" for n in range(30) for e in ("jpg", "txt")})
    with pytest.raises(AbsentValue) as error:
        MemberSource("txt").value(dotted)
    assert "has no member txt, but 60 like 'shot.2023.00.txt'" in str(error.value)
    assert "ends at its first dot" in str(error.value)
    with pytest.raises(AbsentValue) as error:
        MemberSource("txt").value(sample(jpg=b"x"))
    assert "dot" not in str(error.value).replace("dots.tar", "")
