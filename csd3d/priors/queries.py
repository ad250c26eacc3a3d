"""All predictions of a step in one batched call of the prior. Symbols as in `prior`."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from csd3d.distillation.method import Network, Query
from csd3d.errors import InputError
from csd3d.priors.condition import Condition

if TYPE_CHECKING:
    from csd3d.priors.prior import Prior

NO_NETWORKS: Mapping[str, Network] = MappingProxyType({})


class Predictor(Protocol):
    """The part of a prior that `predict_queries` uses."""

    def query_condition(self, query: Query) -> Condition: ...

    def predict_noise(self, z_t: Tensor, t: int | Tensor, condition: Condition) -> Tensor: ...


@torch.no_grad()
def predict_queries(
    prior: Predictor, queries: Mapping[str, Query], networks: Mapping[str, Network] = NO_NETWORKS
) -> dict[str, Tensor]:
    """The prediction [N, ...] of every query by name, without a graph.

    Queries with an equal `key` are computed once. The prior gets all its queries in one call of concatenated rows, in
    the order of the queries, each row with its own t; conditions of different shapes need one call per shape. Queries
    of another network are answered by `networks`. Rows that a query does not name are 0.
    Raises ValueError for an unknown network.
    """
    unique = {query.key: query for query in queries.values()}  # in order of first use
    answers: dict[tuple, Tensor] = {}
    groups: dict[tuple, list[tuple[Query, Query, Condition]]] = {}
    for key, query in unique.items():
        if query.network != "prior":
            if query.network not in networks:
                raise ValueError(f"a query names the network {query.network!r}; there are: {list(networks)}")
            answers[key] = networks[query.network].answer(query)
        else:
            reduced = restricted(query)
            condition = prior.query_condition(reduced)
            groups.setdefault((tuple(reduced.z_t.shape[1:]), condition.shapes), []).append((query, reduced, condition))
    for group in groups.values():
        counts = [len(reduced.z_t) for _, reduced, _ in group]
        t = torch.tensor([reduced.t for _, reduced, _ in group]).repeat_interleave(torch.tensor(counts))
        condition = Condition.cat([condition for *_, condition in group])
        eps = prior.predict_noise(torch.cat([reduced.z_t for _, reduced, _ in group]), t, condition)
        for (query, *_), part in zip(group, eps.split(counts), strict=True):
            answers[query.key] = spread(query, part)
    return {name: answers[query.key] for name, query in queries.items()}


def check_image_scale(prior: "Prior", scale: float | None, key: str) -> None:
    """Raise InputError where a job's `key` guides by the picture, and the model has no prediction without one."""
    if prior.source is not None and "null" not in prior.source.branches and scale not in (None, 1):
        raise InputError(
            f"{key}: {scale:g}, but {prior.family or 'this model'} has no prediction without a source picture to guide "
            "away from: leave it out, or set it to 1"
        )


def restricted(query: Query) -> Query:
    """The query reduced to its `rows`."""
    if query.rows is None:
        return query
    rows = query.rows.tolist()
    parts = {name: getattr(query, name) for name in ("z_t", "image", "pose", "view")}
    parts = {name: value if value is None else value[query.rows.to(value.device)] for name, value in parts.items()}
    return replace(query, prompts=tuple(query.prompts[row] for row in rows), rows=None, **parts)


def spread(query: Query, answer: Tensor) -> Tensor:
    """The prediction [R, ...] of a query's `rows`, spread to all its rows [N, ...]; the others are 0."""
    if query.rows is None:
        return answer
    whole = answer.new_zeros(len(query.z_t), *answer.shape[1:])
    whole[query.rows.to(answer.device)] = answer
    return whole
