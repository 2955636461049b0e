"""What transformer families call their parts: one table of names, relative to a block, for all of them.

A name means different things in different sub-layers (``c_proj`` closes GPT-2's attention and its MLP), so
every name is read in the section it stands in: "attention", "cross_attention" or "mlp". The names are those
of the modelling files of Hugging Face transformers and diffusers, timm and torch.
"""

import re
from collections.abc import Iterable

ATTENTION, CROSS_ATTENTION, MLP = SECTIONS = ("attention", "cross_attention", "mlp")
UNKNOWN = ""  # a norm whose name says nothing

_CROSS = re.compile(r"cross_?att|encoder_?att|enc_?dec_?att|^multihead_attn$|^attn2$", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|(^|_)att(_|$)", re.IGNORECASE)

# (part of the sub-layer, names of the linear that computes it)
_ATTENTION_LINEARS = (
    ("q", r"q|q_proj|q_lin|query|query_proj|to_q|wq|q_attn|q_a_proj|q_b_proj|add_q_proj"),
    ("k", r"k|k_proj|k_lin|key|key_proj|to_k|wk|add_k_proj"),
    ("v", r"v|v_proj|v_lin|value|value_proj|to_v|wv|add_v_proj"),
    ("qkv", r"qkv|qkv_proj|c_attn|query_key_value|Wqkv|in_proj|to_qkv|to_added_qkv"),
    ("kv", r"kv|kv_proj|to_kv|kv_a_proj_with_mqa|kv_b_proj"),
    ("o", r"o|o_proj|out_proj|out_lin|c_proj|dense|proj|projection|Wo|wo|to_out(?:\.0)?|to_add_out|output_proj"),
    ("position", r"pos_(?:key|query)(?:_proj)?|pos_q_proj|pos_proj|linear_pos|r_net"),
)
_MLP_LINEARS = (
    ("gate_up", r"gate_up_proj"),
    ("gate", r"gate_proj|wi_0|w1"),
    (
        "up",
        r"up_proj|fc1|c_fc|lin1|linear1|wi|wi_1|Wi|w3|fc_in|weights_in|input_linear|dense_h_to_4h"
        r"|intermediate\.dense|intermediate_dense|ffn|layer_1|net\.0\.proj",
    ),
    (
        "down",
        r"down_proj|fc2|c_proj|lin2|linear2|wo|Wo|w2|fc_out|weights_out|output_linear|dense_4h_to_h"
        r"|output\.dense|output_dense|ffn_output|layer_2|net\.2",
    ),
    ("router", r"gate|router|shared_expert_gate|router\.(?:classifier|layer)"),
)


def _compiled(table: Iterable[tuple[str, str]]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((part, re.compile(rf"(?:.*\.)?(?:{names})")) for part, names in table)


_LINEARS = {
    ATTENTION: _compiled(_ATTENTION_LINEARS),
    CROSS_ATTENTION: _compiled(_ATTENTION_LINEARS),
    MLP: _compiled(_MLP_LINEARS),
}
# attention whose projections lie directly in the block, without a module of their own: only telling names
_BARE = _compiled(
    (
        ("q", r"q_proj|query|query_proj|to_q|wq"),
        ("k", r"k_proj|key|key_proj|to_k|wk"),
        ("v", r"v_proj|value|value_proj|to_v|wv"),
        ("qkv", r"qkv|qkv_proj|query_key_value|Wqkv|to_qkv"),
    )
)

# fused projections whose rows are ordered head by head (q, k, v of head 0, then of head 1, ...), so that no
# contiguous range of the output features is the query
_INTERLEAVED = re.compile(r"query_key_value|in_proj")
_INTERLEAVED_CLASSES = re.compile(r"CodeGen")
# fused gated units whose halves are known: what the first and the second half of the output features are
_HALVES = (
    (("gate", "up"), re.compile(r"(?:.*\.)?(?:gate_up_proj|Wi|weights_in|input_linear)")),
    (("up", "gate"), re.compile(r"(?:.*\.)?net\.0\.proj")),
)
# linears that turn a condition (time, class, text) into shifts and scales of the features
_MODULATION = re.compile(r"norm|adaln|modulation|time_emb_proj", re.IGNORECASE)

_NORMS = (
    ("other", r"(?:.*\.)?(?:q|k|v|query|key|q_a|kv_a|head|ffn|inner_attn)_?(?:layer_?|ln_)?norm|.*sub_?norm|.*_ln"),
    (CROSS_ATTENTION, r"encoder_attn_layer_norm|cross_?att\w*norm\w*|ln_cross_attn|norm_cross\w*"),
    (
        ATTENTION,
        r"input_layernorm|ln_?1|ln_attn|norm1|norm_?attn|layer_norm1|layernorm_before|layer_?norm|sa_layer_norm"
        r"|self_attn_layer_norm|attn_norm|attention_norm|attn_ln|attention_layernorm|post_self_attn_layernorm|operator_norm",
    ),
    (
        MLP,
        r"post_attention_layernorm|ln_?2|ln_mlp|norm2|norm3|norm_?mlp|norm_?ffn|layer_norm2|layernorm_after"
        r"|output_layer_norm|final_layer_norm|final_layernorm|mlp_norm|ffn_norm|mlp_ln|LayerNorm"
        r"|(?:pre|post)_(?:feedforward|mlp|ff)_layernorm|full_layer_layer_norm",
    ),
)
# SAM's blocks attend to the image, and from the image back
_TWO_WAY = {"layer_norm2": CROSS_ATTENTION, "layer_norm3": MLP, "layer_norm4": CROSS_ATTENTION}
_NORM_PATTERNS = tuple((section, re.compile(names)) for section, names in _NORMS)

# modules of the block between a sub-layer's own module and the residual sum, used by that sub-layer alone
_EXITS = {
    ATTENTION: re.compile(r"post_attention_dropout|resid_attn_dropout|layer_?scale_?1|ls1|post_self_attn_layernorm"),
    CROSS_ATTENTION: re.compile(r"post_cross_attention_dropout"),
    MLP: re.compile(
        r"post_mlp_dropout|resid_mlp_dropout|layer_?scale_?2|ls2|post_mlp_layernorm|post_feedforward_layernorm"
    ),
}
DROPOUTS = ("dropout", "output_dropout", "resid_dropout", "drop")

_EMBEDDINGS = (
    ("bias", r"relative_attention_bias|relative_position_bias_table"),
    ("type", r"token_type|segment|type_embed"),
    ("position", r"pos|wpe|rel_embed|distance_embedding"),
)


def section_of(names: Iterable[str], classes: Iterable[str]) -> str:
    """The sub-layer that names speak of.

    Args:
        names: the names of the modules around it, inside the block, such as ("attention", "self").
        classes: the class names of these modules.
    """
    words = (*names, *classes)
    if any(_CROSS.search(word) for word in words):
        return CROSS_ATTENTION
    return ATTENTION if any(_ATTENTION.search(word) for word in words) else MLP


def linear_part(section: str, path: str) -> tuple[str, str] | None:
    """(section, part) of a linear from its section and its path inside the block; None if no name is known."""
    for part, pattern in _LINEARS[section]:
        if pattern.fullmatch(path):
            return section, part
    if section == MLP:
        for part, pattern in _BARE:
            if pattern.fullmatch(path):
                return ATTENTION, part
    return None


def in_order(path: str, owner: str) -> bool:
    """Whether the fused projection at `path`, in a module of class `owner`, is laid out as q | k | v."""
    return not _INTERLEAVED.fullmatch(path.rpartition(".")[2]) and not _INTERLEAVED_CLASSES.match(owner)


def halves(path: str) -> tuple[str, str] | None:
    """What the two halves of a fused gated projection are, in their order, where its name tells."""
    return next((names for names, pattern in _HALVES if pattern.fullmatch(path)), None)


def condition_role(words: Iterable[str]) -> str | None:
    """The role of a linear that serves a condition (time step, class, text), from the words around it, inmost first.

    Adaptive norms modulate; what makes their input out of a time step or a class is an embedding.
    """
    for word in words:
        if _MODULATION.search(word):
            return "modulation"
        if re.search(r"embedder|embedding|caption", word, re.IGNORECASE):
            return "embedding.projection"
    return None


def norm_section(path: str, siblings: Iterable[str]) -> str:
    """The sub-layer of a norm that lies directly in a block, from its name; "other" for norms inside a sub-layer.

    Args:
        path: path of the norm inside the block.
        siblings: names of the block's own children, which tell apart families that share a name.
    """
    siblings = set(siblings)
    if path == "post_attention_layernorm":
        early = "input_layernorm" not in siblings and "post_mlp_layernorm" in siblings
        return ATTENTION if early or "post_feedforward_layernorm" in siblings else MLP
    if path == "norm2" and "norm3" in siblings:
        return CROSS_ATTENTION
    if "layer_norm4" in siblings and path in _TWO_WAY:
        return _TWO_WAY[path]
    for section, pattern in _NORM_PATTERNS:
        if pattern.fullmatch(path):
            return section
    return UNKNOWN


def before_sublayer(path: str) -> bool:
    """Whether the name of a block's norm says that it is applied to the input of a sub-layer."""
    return re.fullmatch(r"input_layernorm|layernorm_before|pre_\w+|norm_?in|operator_norm", path) is not None


def exits(section: str, siblings: Iterable[str]) -> list[str]:
    """Names of the block's children that close the sub-layer before its residual sum."""
    siblings = list(siblings)
    found = [name for name in siblings if _EXITS[section].fullmatch(name)]
    if section == ATTENTION and "post_feedforward_layernorm" in siblings and "post_attention_layernorm" in siblings:
        found.append("post_attention_layernorm")
    if {"dropout1", "dropout2"} <= set(siblings):  # torch's own layers number theirs in the order of use
        last = "dropout3" if "dropout3" in siblings else "dropout2"
        found.append({ATTENTION: "dropout1", CROSS_ATTENTION: "dropout2", MLP: last}[section])
    return found


def embedding_role(path: str) -> str:
    """The role of an embedding table from its path."""
    name = path.rpartition(".")[2].lower()
    for role, pattern in _EMBEDDINGS:
        if re.search(pattern, name):
            return f"embedding.{role}"
    return "embedding.token"
