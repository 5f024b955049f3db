"""Which experts tokens went to in the engine, so that the learner can send them there too."""

from collections import defaultdict
from typing import Any

import torch

UNKNOWN = -1


class RoutingRecorder:
    """Keeps, for each request that vLLM's model runner computes, the experts of every token.

    The runner's model has a buffer `routing` [tokens, sparse layers, top_k], int16, that a forward pass fills with the
    rows of its batch; after each pass they are handed out to the requests in the order in which vLLM put them there.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.execute = runner, runner.execute_model
        self.buffer: torch.Tensor = runner.get_model().model.routing
        self.pieces: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        runner.execute_model = self._execute

    def _execute(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.execute(scheduled, *args, **kwargs)
        counts, batch = scheduled.num_scheduled_tokens, self.runner.input_batch
        rows, begin = self.buffer[: sum(counts.values())].clone(), 0
        for name, computed in zip(batch.req_ids, batch.num_computed_tokens_cpu, strict=False):
            if count := counts.get(name, 0):
                self.pieces[name].append((int(computed), rows[begin : begin + count]))
                begin += count
        return result

    def take(self, name: str, tokens: int) -> torch.Tensor:
        """[tokens, sparse layers, top_k], int16, of a request's first tokens; its record is given up.

        Negative where no pass computed a token: the last one, which was drawn and never read.
        """
        found = torch.full((tokens, *self.buffer.shape[1:]), UNKNOWN, dtype=torch.int16)
        pieces = self.pieces.pop(name, [])
        if pieces:
            rows = torch.cat([piece for _, piece in pieces]).cpu()
            places = torch.cat([torch.arange(start, start + len(piece)) for start, piece in pieces])
            known = places < tokens
            found[places[known]] = rows[known]
        return found

    def drop(self, name: str) -> None:
        """Give up a request's record."""
        self.pieces.pop(name, None)
