"""What one measurement has given."""

from __future__ import annotations

from dataclasses import asdict, dataclass

Cpu = tuple[float, float, float, float]  # of a gateway, of PostgreSQL, of all programs, stolen


@dataclass
class Sample:
    """One measurement. Latencies in microseconds, CPU in seconds, ``error`` empty if all went well."""

    target: str
    op: str
    clients: int
    ops: int = 0
    seconds: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    max: float = 0.0
    errors: int = 0
    error: str = ""
    driver_cpu: float = 0.0
    gateway_cpu: float = 0.0
    postgres_cpu: float = 0.0
    other_cpu: float = 0.0  # of everything that has nothing to do with the measurement
    stolen_cpu: float = 0.0  # what the machine's host gave to others though it was wanted here

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def book(self, *spans: tuple[Cpu, Cpu]) -> None:
        """Enter what each has taken between these moments; the load generator's is there already."""
        taken = [[late - early for early, late in zip(*span, strict=True)] for span in spans]
        self.gateway_cpu, self.postgres_cpu, busy, self.stolen_cpu = map(sum, zip(*taken, strict=True))
        self.other_cpu = max(0.0, busy - self.gateway_cpu - self.postgres_cpu - self.driver_cpu)
