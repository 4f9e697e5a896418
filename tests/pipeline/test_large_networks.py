"""Networks of tens of millions of parameters, from lifting to files, within twice the memory of plain training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the benchmarks are not installed"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read as Linux tells it"),
]


@pytest.mark.parametrize(("network", "total"), [("resnet_50", 25_557_032), ("vit_base", 86_567_656)])
def test_lift_to_files(network, total):
    found = {}
    for road in ("plain", "gates"):
        command = [sys.executable, "-m", "benchmarks.large_networks", "--networks", network, "--case", road]
        done = subprocess.run([*command, "--rows", "4", "--batch", "4"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[road] = json.loads(done.stdout.splitlines()[-1])
    assert found["plain"]["parameters"] == [total, total]
    before, after = found["gates"]["parameters"]
    assert before == total and 0 < after <= total // 2
    assert found["gates"]["peak"] <= 2 * found["plain"]["peak"]
