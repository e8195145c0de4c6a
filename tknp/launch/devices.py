"""Which GPUs each engine of this machine gets: its own, since vLLM fills what it sees."""

from __future__ import annotations

from tknp.launch.options import CannotServeError


def assign_devices(needs: list[int], devices: list[str]) -> list[list[str]]:
    """Disjoint devices for engines that need so many each.

    Raises:
        CannotServeError: there are not enough of them.
    """
    if sum(needs) > len(devices):
        raise CannotServeError(
            f"these engines need {sum(needs)} GPUs ({' + '.join(map(str, needs))}) and this machine offers "
            f"{len(devices)}; ask for fewer replicas or a smaller --token-parallel-size or --tensor-parallel-size"
        )
    rest = iter(devices)
    return [[next(rest) for _ in range(need)] for need in needs]
