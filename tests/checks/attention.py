"""Attention processors, fused projections, slicing, IP-Adapters."""

from typing import Any

import pytest
import torch
from diffusers.models.attention import AttentionMixin

from tests.checks.base import Base, changed


class AttentionLayers(Base):
    """What diffusers lets users do to attention layers, before a model is transformed and after."""

    processor: Any
    """The class of the default attention processor."""

    def test_processors_are_set_one_by_one_and_all_at_once(self) -> None:
        class Own(self.processor):  # type: ignore[misc, name-defined]
            """Another class, which computes the same."""

            any_tokens = True

        model = self.merged()
        output = self.run(model)
        assert {type(each) for each in model.attn_processors.values()} == {self.processor}
        assert list(model.attn_processors) == list(self.untouched().attn_processors)
        model.set_attn_processor({name: Own() for name in model.attn_processors})
        assert {type(each) for each in model.attn_processors.values()} == {Own}
        self.same(model, output)
        model.set_attn_processor(self.processor())
        assert {type(each) for each in model.attn_processors.values()} == {self.processor}
        self.same(model, output)
        original = self.untouched()
        original.set_attn_processor(Own())
        self.same(self.merged(original), output)

    def test_count_of_processors_must_match(self) -> None:
        model = self.merged()
        name, *_ = model.attn_processors
        with pytest.raises(ValueError, match="number of processors"):
            model.set_attn_processor({name: self.processor()})

    def test_default_processors(self) -> None:
        model = self.merged()
        if not hasattr(model, "set_default_attn_processor"):
            pytest.skip("the model has no set_default_attn_processor")
        output = self.run(model)
        model.set_default_attn_processor()
        self.same(model, output)

    def test_fused_projections(self) -> None:
        model = self.merged()
        assert isinstance(model, AttentionMixin)
        output = self.run(model)
        model.fuse_qkv_projections()
        assert any(getattr(m, "fused_projections", False) for m in model.modules())
        self.same(model, output)
        model.unfuse_qkv_projections()
        self.same(model, output)
        fused = self.untouched()
        fused.fuse_qkv_projections()
        self.same(self.merged(fused), output)

    def test_slicing(self) -> None:
        if not hasattr(self.untouched(), "set_attention_slice"):
            pytest.skip("the model has no attention slicing")
        output = self.run(self.merged())
        for size in ("auto", "max", 2):
            before, after = self.untouched(), self.merged()
            before.set_attention_slice(size)
            after.set_attention_slice(size)
            assert "Sliced" in str(next(iter(after.attn_processors.values())))
            self.same(self.merged(before), output)
            self.same(after, output)
        for wrong in (1000, [1]):
            with pytest.raises(ValueError, match=r"size|slice"):
                after.set_attention_slice(wrong)

    def ip_adapter(self, model: Any) -> None:
        """Load an IP-Adapter of random weights into a model."""
        raise NotImplementedError

    def image_embeds(self) -> dict[str, Any]:
        """Arguments of a call with an image prompt."""
        raise NotImplementedError

    def test_ip_adapter_before_transform(self) -> None:
        original = self.untouched()
        self.ip_adapter(original)
        model = self.merged(original)
        output = self.run(model, **self.image_embeds())
        assert changed(output, self.run(original, **self.image_embeds()))
        scaled = [p for p in model.attn_processors.values() if hasattr(p, "scale")]
        assert scaled
        for each in scaled:
            each.scale = [0.0]
        assert changed(output, self.run(model, **self.image_embeds()))
        torch.testing.assert_close(
            self.run(model, **self.image_embeds()), self.run(self.merged()), rtol=1e-5, atol=1e-5
        )


def embeds(width: int) -> torch.Tensor:
    """Embeddings of one image for each of two prompts."""
    return torch.randn(2, 1, width, generator=torch.Generator().manual_seed(0))
