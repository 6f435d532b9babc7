"""fastattn on sharded tensors: importing this package tells DTensor how operators may be split.

>>> import fastattn.distributed
>>> out = fastattn.attention(q, k, v)   # DTensors, split along batch or heads: no communication
"""

from fastattn.distributed.sharding import register

__all__ = ["register"]

register()
