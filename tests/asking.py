"""predict(queries) of a prior that has `condition` and `predict_noise`, and InstructPix2Pix's three conditions."""

from dataclasses import replace

import torch

from csd3d.priors import Condition


def asking(prior, networks=None, calls=None):
    """Equal queries are computed once; `calls` collects the queries of every call that were."""

    def predict(asked):
        different = {query.key: query for query in asked.values()}
        found = {key: answer(query) for key, query in different.items()}
        if calls is not None:
            calls.append(list(different.values()))
        return {name: found[query.key] for name, query in asked.items()}

    def answer(query):
        if query.network != "prior":
            return networks[query.network].answer(query)
        rows = torch.arange(len(query.z_t)) if query.rows is None else query.rows
        eps = torch.zeros_like(query.z_t)
        if len(rows):
            image = None if query.image is None else query.image[rows]
            condition = prior.condition([query.prompts[i] for i in rows.tolist()], image)
            eps[rows] = prior.predict_noise(query.z_t[rows], query.t, condition).to(eps)
        return eps

    return predict


def edit_branches(text, null_text, image):
    """InstructPix2Pix's conditions (∅, ∅), (x̃, ∅), (x̃, y), of embeddings or `Condition`s and `encode_condition`."""
    given = (words if isinstance(words, Condition) else Condition(words) for words in (null_text, text))
    null, full = (words.expand(len(image)) for words in given)
    return replace(null, image=torch.zeros_like(image)), replace(null, image=image), replace(full, image=image)
