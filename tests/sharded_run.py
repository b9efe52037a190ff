"""`minillm` in FSDP2's shards on CPUs; started by accelerate launch."""

from __future__ import annotations

from minillm.cli import main
from tests.train.two_processes import shard_on_cpus

if __name__ == "__main__":
    shard_on_cpus()
    main()
