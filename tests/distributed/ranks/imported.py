"""What forked.py's server does once, before it forks, of what every rank would do."""

import gc

from train.distributed.world import import_deepspeed
from train.lamb import native

import_deepspeed()
native.build()
# A process that ends would look for garbage among a million objects, each page of which it must copy first.
gc.collect()
gc.freeze()
