"""What a front end reads from the modules that it holds, at each call: weights, options and why it must call them instead."""

from . import checks, parts, planner
from . import functional as F
from . import ids as outside


class HoldsParts(outside.HasIdPolicy):
    """A front end's modules, by the names of parts.NAMES, dropout and rotary; most are None."""

    _groups = position_offset = 0
    scale, combine, heads_first, _own_scale = None, "sum", False, None
    batch_invariant = False

    def _policy(self):
        """Its own, or its token table's, where that is a pyembed.Embedding with one."""
        token = self._modules["token"]
        return outside.applied(self._id_policy or (token._id_policy if isinstance(token, outside.HasIdPolicy) else None))

    def _check(self, ids, position_ids, segment_ids=None):
        token, segment = self._modules["token"].weight, getattr(self._modules["segment"], "weight", None)
        tables = (self._position(), position_ids, self._modules["rotary"], segment, segment_ids)
        checks.check_front_end(ids, token, *tables, self._policy())

    def _kept(self, ids, position_ids, segment_ids):
        """The three as the policy leaves them."""
        policy = self._policy()
        if policy not in ("clamp", "zero"):
            return ids, position_ids, segment_ids
        token, segment = self._modules["token"].weight, getattr(self._modules["segment"], "weight", None)
        return F.kept(policy, ids, token, self._position(), position_ids, segment, segment_ids)

    def _check_shapes(self, ids, position_ids, segment_ids):
        token, position, segment = self._modules["token"].weight, self._position(), self._modules["segment"]
        segment = None if segment is None else segment.weight
        checks.check_terms(ids, token, None, position_ids, segment, segment_ids, None, 0.0)
        checks.check_positions(ids, position, position_ids, self._modules["rotary"])

    def _foreign(self):
        """Why the parts must be called; None: their weights say all."""
        foreign = "positions stand beside token rows" if self.combine == "concat" else parts.foreign(self._modules)
        if foreign and self.batch_invariant:
            raise RuntimeError(f"batch_invariant: expected modules that are no more than their weights, but {foreign}")
        return foreign

    def _refuses_plans(self):
        """Why one_pass alone can run a call; None: other plans can."""
        token = self._modules["token"].weight
        terms = (token, self._position(), self._scale(), self._modules["segment"], self._drops())
        return planner.refuses(*terms, self._policy(), self.batch_invariant)

    def _position(self):
        module = self._modules["position"]
        if module is None:
            return None
        return module.weight[self.position_offset :] if self.position_offset else module.weight

    def _norm(self, token):
        return parts.norm_arguments(self._modules["norm"], token.dtype)

    def _extras(self, token):
        """What few front ends have, as functional.embed_qkv takes it. token: its weight, perhaps computed at each access."""
        segment, extras = self._modules["segment"], {}
        if self.scale is not None or self._own_scale is not None:
            extras["scale"] = self._scale()
        if segment is not None:
            extras["segment"] = segment.weight
        if self._drops():
            extras["dropout"] = self._modules["dropout"].p
        if self.heads_first:
            extras["heads_first"] = True
        if self.batch_invariant:
            extras["batch_invariant"] = True
        if self._modules["query_norm"] is not None:
            query, key = (parts.norm_arguments(self._modules[name], token.dtype) for name in ("query_norm", "key_norm"))
            extras |= {"query_norm": query["norm_weight"], "key_norm": key["norm_weight"], "head_eps": query["eps"]}
        return extras

    def _own_rotary(self, device):
        """On token's device: outside of its model's tree a front end does not hear of to() either."""
        rotary = self._modules["rotary"]
        if rotary is not None and rotary.cos.device != device:
            rotary.to_empty(device=device)  # which fills its tables, also those that were on meta
        return rotary

    def _scale(self):
        return self.scale if self._own_scale is None else self._own_scale.of(self._modules["token"])

    def _drops(self):
        """As token says: a front end outside of its model's tree does not hear of train() and eval()."""
        return self._modules["dropout"].p > 0 and self._modules["token"].training

    def _projection(self):
        return parts.projection(self._modules["qkv"], self._groups, self._head_dim)
