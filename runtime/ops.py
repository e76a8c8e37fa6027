"""Operators as named nodes, ``torch.ops.toma.*``, in FX, Dynamo and export graphs.

They are composite: a graph shows them by name until it is lowered. After that it contains only ATen
operators, which Inductor can fuse and which an exported file can run without this package.
"""

from hashlib import sha256
from pathlib import Path

import torch
import torch.compiler.config

from toma_fx.runtime import keys, merging, selector, token_order

LIBRARY = torch.library.Library("toma", "DEF")

for schema, function in {
    "tile_order(Tensor like, SymInt height, SymInt width) -> Tensor": token_order.tile_order,
    "video_order(Tensor like, SymInt frames, SymInt height, SymInt width, SymInt first,"
    " int chunk, int[] given=[]) -> Tensor": token_order.video_order,
    "tile_order_of_ids(Tensor ids) -> Tensor": token_order.tile_order_of_ids,
    "reorder(Tensor tokens, Tensor order) -> Tensor": token_order.reorder,
    "select(Tensor tokens, SymInt[] layout, str selector) -> Tensor": selector.select,
    "weigh(Tensor tokens, Tensor destinations, SymInt[] layout, float temperature, str merge_over,"
    " str unmerge) -> (Tensor, Tensor)": merging.weigh,
    "fixed_weights(Tensor tokens, Tensor destinations, SymInt[] layout)"
    " -> (Tensor, Tensor)": merging.fixed_weights,
    "gather(Tensor tokens, Tensor destinations) -> Tensor": merging.gather,
    "rows(Tensor values, Tensor destinations, int dim, SymInt before, SymInt after=0)"
    " -> Tensor": merging.rows,
    "merge(Tensor tokens, Tensor weight, SymInt[] layout, SymInt after=0) -> Tensor": merging.merge,
    "unmerge(Tensor tokens, Tensor weight, SymInt[] layout, SymInt after=0)"
    " -> Tensor": merging.unmerge,
    "log_sizes(Tensor unmerge_weight) -> Tensor": keys.log_sizes,
    "merge_heads(Tensor heads, Tensor weight, SymInt[] layout, int dim, SymInt after=0)"
    " -> Tensor": keys.merge_heads,
    "with_sizes(Tensor query, Tensor key, Tensor value, Tensor log_sizes, float scale, int dim,"
    " SymInt after=0) -> (Tensor, Tensor, Tensor)": keys.with_sizes,
}.items():
    LIBRARY.define(schema)
    LIBRARY.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")

# torch caches compiled code on disk by the names of the operators in it, not by their code. So a
# changed operator would get the code of the old one. The tag is part of every cache key.
_sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
torch.compiler.config.cache_key_tag += f" toma_fx {sha256(_sources).hexdigest()[:16]}"
