"""What the scheduler is told of tasks that are handed over at once."""

from __future__ import annotations

from typing import Any

import pytest

from streamgd.run.graph import Graph


class FakeClient:
    def get(self, graph: Any, wanted: list[Any], *, sync: bool) -> list[Any]:
        assert not sync
        self.annotations = {key: layer.annotations for layer in graph.layers.values() for key in layer.mapping}
        self.tasks = dict(graph)
        return wanted


@pytest.mark.parametrize("fit", [None, ["a", "b"]], ids=["all are fit", "some are fit"])
def test_where_tasks_may_run(fit: list[str] | None) -> None:
    client = FakeClient()
    graph = Graph(client, fit)
    graph.add("anywhere", None, 5, abs, -1)
    graph.add("rather", "a", 7, abs, "anywhere")
    assert graph.hand_over(["anywhere", "rather"]) == ["anywhere", "rather"]
    told = client.annotations
    if fit is None:
        assert told["anywhere"] == {"priority": 5}
        assert told["rather"] == {"priority": 7, "workers": ["a"], "allow_other_workers": True}
    else:
        assert told["anywhere"] == {"priority": 5, "workers": fit}
        assert told["rather"] == {"priority": 7, "workers": fit}
    assert client.tasks["rather"] == (abs, "anywhere")
