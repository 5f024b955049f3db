"""What a case gave, and how it is shown: lines or one JSON object, and a file that grows row by row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltarl.rl.errors import UserError

# Both sides round to bf16 a few times on the way, each for some 0.002 of the result; another formula is off by more.
SAME = 0.03


@dataclass
class Row:
    """One case: what one call of ours took, and of each peer, in seconds (medians) and bytes.

    moved: bytes that a call must read and write at least. difference: RMS of the peer's results minus ours, over ours.
    kernels: seconds of each Triton kernel in a call of ours; none where it ran torch's. failed: why nothing is here.
    """

    case: str
    what: str
    seconds: float | None = None
    peak_bytes: int | None = None
    moved: int | None = None
    kernels: dict[str, float] | None = None
    failed: str | None = None
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self, copy_rate: float | None = None) -> dict[str, Any]:
        """With peer_seconds and ratio (peer_seconds / seconds) of a peer that computed the same, fla before torch."""
        found: dict[str, Any] = {"case": self.case, "what": self.what, "seconds": self.seconds}
        comparable = sorted(name for name in self.peers if self.ratio(name) is not None)
        name = comparable[0] if comparable else None
        found |= {"peer_seconds": self.peers[name]["seconds"] if name else None, "ratio": self.ratio(name)}
        extra = {"peer": name, "peak_bytes": self.peak_bytes, "moved_bytes": self.moved, "kernels": self.kernels}
        if self.seconds and self.moved:
            extra["bytes_per_second"] = self.moved / self.seconds
            extra["of_copy"] = self.moved / self.seconds / copy_rate if copy_rate else None
        extra |= {"failed": self.failed}
        peers = {name: {**peer, "ratio": self.ratio(name)} for name, peer in self.peers.items()}
        return found | {key: value for key, value in extra.items() if value is not None} | {"peers": peers}

    def ratio(self, name: str | None) -> float | None:
        """How many times longer the peer takes; None where one of the two has no time or they differ."""
        peer = self.peers.get(name or "", {})
        if self.seconds is None or "seconds" not in peer or not peer.get("difference", 0.0) <= SAME:
            return None
        return peer["seconds"] / self.seconds

    def line(self, copy_rate: float | None = None) -> str:
        parts = [f"{self.case:36} {self.what:28}", f"ours {self._ours(copy_rate)}"]
        for name, peer in self.peers.items():
            if "failed" in peer:
                parts.append(f"{name} failed: {peer['failed']}")
                continue
            ratio, apart = self.ratio(name), peer.get("difference", 0.0)
            shown = f"{ratio:.2f} x" if ratio is not None else "" if apart <= SAME else f"differs by {apart:.2g}"
            parts.append(f"{name} {duration(peer['seconds'])} {gibibytes(peer.get('peak_bytes'))} {shown}")
        return "   ".join(parts)

    def _ours(self, copy_rate: float | None) -> str:
        if self.failed:
            return f"failed: {self.failed}"
        if self.seconds is None:
            return "not measured"
        shown = f"{duration(self.seconds)} {gibibytes(self.peak_bytes)}"
        if self.moved:
            rate = self.moved / self.seconds
            shown += f" {rate / 1e12:.2f} TB/s" + (f" ({rate / copy_rate:.0%} of a copy)" if copy_rate else "")
        return shown + ("" if self.kernels is None or self.kernels else " (torch code)")


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def gibibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f} GiB"


class Report:
    """Takes rows as they come. Raises UserError when the file cannot be written."""

    def __init__(self, about: Mapping[str, Any], out: str | None, *, as_json: bool) -> None:
        self.about, self.as_json = dict(about), as_json
        self.copy_rate = self.about.get("copy_bytes_per_second")
        self.rows: dict[str, Row] = {}
        self.out = None if out is None else Path(out)
        self._append(self.about)
        if not as_json:
            print("  ".join(f"{key} {value}" for key, value in self.about.items()), flush=True)

    def add(self, row: Row) -> None:
        """A row, or the same case again with one peer more: the last one counts, in the file too."""
        self.rows[row.case] = row
        self._append(row.as_json(self.copy_rate))
        if not self.as_json:
            print(row.line(self.copy_rate), flush=True)

    def finish(self) -> int:
        """Prints the JSON object where one was asked for; 1 if a case of ours failed."""
        if self.as_json:
            rows = [row.as_json(self.copy_rate) for row in self.rows.values()]
            print(json.dumps({**self.about, "rows": rows}))
        return int(any(row.failed for row in self.rows.values()))

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.out is None:
            return
        try:
            with self.out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"--out {self.out}: {error.strerror}") from error
