"""What a fleet may be told; Ray is imported, and not started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

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
        {"retention_hours": 1e9},
        {"grace": 1e12},
        {"painters": 2, "most_painters": 1},
        {"allow_network": "nonsense"},
        {"nobody": 1},
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(fleet: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong)).split("_")[-1]):
        fleet.model_validate(wrong)


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        ({"fronts": 2}, "fronts", "fronts is 2; more than 1 need a store in common: name a database"),
        ({"database": "mysql://db/name"}, "database", "it must start with postgresql://"),
        ({"public_url": "paint.example"}, "public_url", "public_url is 'paint.example'; it must start with"),
        ({"memory_budget": "much"}, "memory_budget", "memory_budget is 'much'"),
        ({"device": "abacus"}, "device", "abacus"),
        ({"dtype": "int3"}, "dtype", "int3"),
        ({"backend": "abacus"}, "backend", "abacus"),
    ],
)
def test_the_application_is_not_built_where_its_replicas_would_fail(
    wrong: dict[str, Any], field: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ritocco import RequestError
    from ritocco.scale.serve import app

    monkeypatch.delenv("RITOCCO_DATABASE", raising=False)
    with pytest.raises(RequestError) as caught:
        app(wrong)
    assert caught.value.field == field
    assert words in str(caught.value)


@pytest.mark.parametrize("where", ["args", "environment"])
def test_fronts_with_a_database_are_built(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ritocco.scale.serve import app

    monkeypatch.delenv("RITOCCO_DATABASE", raising=False)
    if where == "environment":
        monkeypatch.setenv("RITOCCO_DATABASE", URL)
    named = {"token_file": "/none/on/this/machine.txt", "fronts": 3}
    made = app(named | ({"database": URL} if where == "args" else {}))
    assert (made._bound_deployment.name, made._bound_deployment.num_replicas) == ("fronts", 3)


@pytest.mark.parametrize(("grace", "painters", "fronts"), [("0", 75, 30), ("30", 75, 60), ("600", 615, 630)])
def test_ray_waits_for_the_grace(grace: str, painters: float, fronts: float) -> None:
    """Of a painter's prediction no less than of the front that waits for it."""
    from ritocco.scale.serve import app

    front = app({"grace": grace})._bound_deployment
    (painter, _) = front.init_args
    configs = [one._deployment_config for one in (painter._bound_deployment, front)]
    assert [one.graceful_shutdown_timeout_s for one in configs] == [painters, fronts]


def test_the_public_name_is_one_of_a_fleets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And those of `allow_host`, and no other."""
    from ritocco.scale.serve import Fleet, FrontReplica

    fleet = Fleet.model_validate(
        {
            "data": tmp_path,
            "no_tokens": True,
            "public_url": "https://Paint.example/tools",
            "allow_host": "paint.internal",
        }
    )
    front = object.__new__(FrontReplica)
    front._fleet, front._painters, front._version = fleet, None, "v"
    made = front.__serve_build_asgi_app__()
    try:
        with TestClient(made) as client:
            for name in ("paint.example", "paint.example:8000", "paint.internal", "localhost", "127.0.0.1"):
                assert client.get("/livez", headers={"Host": name}).status_code == 200, name
            for name in ("evil.example", "paint.example.evil.example", "internal"):
                assert client.get("/livez", headers={"Host": name}).status_code == 400, name
    finally:
        made.close()
