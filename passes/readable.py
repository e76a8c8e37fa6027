"""Print a graph as readable Python.

Before, as torch.fx prints it::

    passed_on = toma_fx_runtime_plan_pass_on(attention_kwargs);  attention_kwargs = None
    merged = torch.ops.toma.merge.default(hidden_states, merge_weight);  merge_weight = None

After::

    passed_on = pass_on(attention_kwargs)
    merged = torch.ops.toma.merge(hidden_states, merge_weight)
"""

import re

from torch import fx


def _subscript(match: re.Match[str]) -> str:
    """Rewrite ``[(slice(None, None, None), slice(a, None, None))]`` as ``[:, a:]``."""
    inner = re.sub(
        r"slice\((\w+), (\w+), None\)",
        lambda m: ":".join("" if part == "None" else part for part in m.groups()),
        match[1],
    )
    return f"[{inner}]"


def readable(gm: fx.GraphModule) -> str:
    """Return the body of a graph's ``forward``, without code that only the interpreter needs."""
    source = gm.graph.python_code("self").src
    body = source[source.index("def forward") :].partition("\n")[2]
    for pattern, text in (
        (r";  [\w = ]*None$", ""),  # freeing of values that are not used again
        (r"\b(torch\.ops\.toma\.\w+)\.default\b", r"\1"),
        (r"\btoma_fx_runtime_(plan|arguments|memory)_", ""),
        (r"\[\((.*slice\(.*)\)\]", _subscript),
        (r"^ {4}", ""),
    ):
        body = re.sub(pattern, text, body, flags=re.MULTILINE)
    return body.strip()
