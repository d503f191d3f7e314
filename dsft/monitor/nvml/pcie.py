"""PCIe traffic, which the driver takes 20 ms to measure: a few measurements a sample, by turns."""

from collections.abc import Sequence

from dsft.monitor.nvml.device import GpuDevice


class PcieMeter:
    """Measures GPUs and directions by turns, and leaves the results in the devices."""

    def __init__(self) -> None:
        self._turn = 0

    def measure(self, devices: Sequence[GpuDevice], num_measurements: int) -> None:
        """Measure the next ones.

        Args:
            devices: Those that are watched; one that is lost, or has said that it does not tell, costs no turn.
            num_measurements: How many at most; each pair of GPU and direction is measured once at most.
        """
        pairs = [(device, direction) for device in devices for direction in device.pcie_directions]
        for _ in range(min(num_measurements, len(pairs))):
            device, direction = pairs[self._turn % len(pairs)]
            device.measure_pcie(direction)
            self._turn += 1
