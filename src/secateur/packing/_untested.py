"""Which routes could not be tried on this machine, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.kernels import candidates, explain_route
from secateur.packing._jobs import Job
from secateur.packing._recurrent import RecurrentJob
from secateur.packing._stacks import StackJob


def untested(jobs: Sequence[Job | StackJob | RecurrentJob]) -> list[str]:
    """Return a note for each kind of route that was allowed, but that this machine cannot run.

    Args:
        jobs: layers that were measured.
    """
    reasons: dict[str, str] = {}
    cpu = torch.device("cpu")
    alike = {(type(job.packed), job.precisions): job for job in jobs if isinstance(job, Job)}
    for job in alike.values():
        if job.precisions == ("exact",):
            continue
        for route in candidates(job.packed, job.patterns, job.precisions):
            if route.precision == "exact" or route.name in reasons:
                continue
            found = explain_route(job.packed, route, cpu, torch.float32)
            if all(reason for _, reason in found):
                reasons[route.name] = "; ".join(f"{backend.name}: {reason}" for backend, reason in found)
    return [f"the route {name} is untested, no backend runs it here ({why})" for name, why in reasons.items()]
