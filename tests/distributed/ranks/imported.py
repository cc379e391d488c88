"""What forked.py's server does once, before it forks, of what every rank would do."""

from train.distributed.world import import_deepspeed
from train.lamb import native

import_deepspeed()
native.build()
