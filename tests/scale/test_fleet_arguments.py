"""What a fleet may be told; Ray is imported, and not started."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

URL = "postgresql://someone:a-secret@db/name"

# Ray's own modules use what pydantic calls old.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def fleet() -> Any:
    from ritocco.scale.serve import Fleet

    return Fleet


@pytest.mark.parametrize("wrong", [{"databse": URL}, {"database": [URL]}, {"database": URL, "painters": 0}])
def test_nothing_shows_a_password(fleet: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        fleet.model_validate(wrong)
    assert "a-secret" not in str(caught.value)
    assert "a-secret" not in repr(fleet(database=URL))


def test_lists_come_as_texts_from_a_command_line(fleet: Any) -> None:
    made = fleet.model_validate({"allow_host": "a,b", "allow_network": "10.0.0.0/8", "painters": "2"})
    assert (made.allow_host, made.allow_network, made.painters) == (("a", "b"), ("10.0.0.0/8",), 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpus": 1.5},
        {"gpus": "inf"},
        {"cpus": 0},
        {"painters": 2, "most_painters": 1},
        {"allow_network": "nonsense"},
        {"nobody": 1},
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(fleet: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong)).split("_")[-1]):
        fleet.model_validate(wrong)
