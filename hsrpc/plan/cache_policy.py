"""Whether activations may be cached at all, decided from the model's sizes and the settings, and said in words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsrpc.config import CachePolicy, EngineConfig, LatentAttention
from hsrpc.errors import ConfigError
from hsrpc.plan.sizes import ModelSizes

_FREE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class CacheDecision:
    """What the planner may choose from."""

    policy: CachePolicy
    """The configured policy."""
    shares: tuple[float, ...]
    """Activations' parts of the device's blocks to try; one alone holds for the host as well."""
    reason: str
    absorbing: tuple[bool, ...] = (False,)
    """Whether single queries attend to activations as they are stored, or to K and V: what to try."""

    @property
    def is_free(self) -> bool:
        return len(self.shares) > 1

    def named(self, share: float) -> CachePolicy:
        """The policy in force at a share of all tokens in use."""
        if self.policy is not CachePolicy.AUTO:
            return self.policy
        return {0.0: CachePolicy.KV, 1.0: CachePolicy.ACTIVATION}.get(share, CachePolicy.HYBRID)

    def explain(self, share: float, device_share: float, host_share: float, on_device: float) -> str:
        """The decision, and what came of it where it was free."""
        if not self.is_free:
            return self.reason
        if share == 0:
            return f"{self.reason}, but reading K and V is predicted to be faster here than rebuilding them: KV only"
        if share == 1:
            return (
                f"{self.reason}, and even so the bus is predicted to take longer than rebuilding them: activations only"
            )
        if 0 < on_device < 1 and device_share != host_share:
            parts = f"{device_share:.2f} on the device and {host_share:.2f} on the host"
            return f"{self.reason}: a share of {parts} is predicted to balance bus and compute"
        return f"{self.reason}: a share of {share:.2f} is predicted to balance bus and compute"

    def explain_absorbing(self) -> str:
        """As `explain`, where single queries attend to activations as they are stored."""
        found = "activations only" if self.is_free else "activations"
        if len(self.absorbing) == 1:
            return f"{self.reason}; {found}, attended to as they are stored, as asked"
        return f"{self.reason}; {found}, to which single queries are predicted to attend faster than to K and V"


def decide_cache(config: EngineConfig, sizes: ModelSizes) -> CacheDecision:
    """Policy, the shares to try, whether single queries attend to activations, and why.

    Raises:
        ConfigError: `latent_attention` asks for what the model or the policy does not allow.
    """
    decision = _decide_shares(config, sizes)
    possible = sizes.can_absorb and max(decision.shares) == 1
    if config.latent_attention is LatentAttention.ABSORB and not possible:
        given = config.latent_attention.value
        if not sizes.can_absorb:
            raise ConfigError("latent_attention", given, "the model keeps no latents", "use auto")
        raise ConfigError("latent_attention", given, "needs activations alone", "use cache_policy=activation, or auto")
    chosen = {
        LatentAttention.AUTO: (False, True) if possible else (False,),
        LatentAttention.REBUILD: (False,),
        LatentAttention.ABSORB: (True,),
    }
    return replace(decision, absorbing=chosen[config.latent_attention])


def _decide_shares(config: EngineConfig, sizes: ModelSizes) -> CacheDecision:
    policy, ratio = config.cache_policy, sizes.activation_ratio
    if policy is CachePolicy.KV:
        return CacheDecision(policy, (0.0,), "KV only, as asked")
    if policy is CachePolicy.ACTIVATION:
        return CacheDecision(policy, (1.0,), "activations only, as asked")
    if policy is CachePolicy.RECOMPUTE:
        return CacheDecision(policy, (0.0,), "nothing is cached, as asked: every step recomputes every token")
    if config.activation_share is not None:
        return CacheDecision(policy, (config.activation_share,), f"share {config.activation_share:g}, as asked")
    if ratio <= 1.0:
        why = f"an activation takes {1 / ratio:.2f} times the bytes of K and V (grouped-query attention): KV only"
        return CacheDecision(policy, (0.0,), why)
    return CacheDecision(policy, _FREE_SHARES, f"K and V take {ratio:.2f} times the bytes of an activation")
