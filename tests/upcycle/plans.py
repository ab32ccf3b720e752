"""Random inputs of plans, for property tests; importing it also lifts hypothesis' deadline, see below."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st

from model.config import ModelConfig
from upcycle.stage_config import StageConfig, StageParallel

# A case takes milliseconds, but on shared cores any of them may be paused; the suite has its own time limit.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

# Utilities and loads of any magnitude, zeros and ties included.
AMOUNTS = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1.0, 1e-30, 1e30]))


def amounts(experts: int) -> st.SearchStrategy[list[float]]:
    """One utility or load per expert."""
    return st.lists(AMOUNTS, min_size=experts, max_size=experts)


@dataclass
class Growth:
    """One expansion that the checks would accept: E = groups x width experts to `after`, on `ep_ranks`."""

    groups: int
    experts: int
    after: int
    cap: int
    ep_ranks: int
    ep_before: int

    def model(self) -> ModelConfig:
        """A network with two MoE layers among four."""
        routing = {"router_groups": self.groups, "router_group_topk": 1} if self.groups > 1 else {}
        return ModelConfig(layers=4, moe_period=2, num_experts=self.experts, top_k=1, **routing)

    def rules(self, selection: str, placement: str, temperature: float = 1.0) -> StageConfig:
        """The stage as configured."""
        return StageConfig(
            at_step=5,
            num_experts=self.after,
            selection=selection,
            placement=placement,
            max_extra_copies=self.cap,
            temperature=temperature,
            parallel=StageParallel(expert=self.ep_ranks),
        )


@st.composite
def growths(draw: st.DrawFn, *, uniform: bool = False, experts: int | None = None) -> Growth:
    """Random sizes that go together; `uniform` for whole multiples."""
    if experts is None:
        groups, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
        # A model has two experts at least.
        width += groups * width < 2
        experts = groups * width
    else:
        groups = draw(st.sampled_from([g for g in range(1, 5) if experts % g == 0]))
        width = experts // groups
    cap = draw(st.integers(1, 4))
    if uniform:
        after = experts * draw(st.integers(2, 1 + cap)) if cap > 1 else 2 * experts
    else:
        after = groups * draw(st.integers(width + 1, width * (1 + cap)))
    ranks = [r for r in range(1, after + 1) if after % r == 0]
    before = [r for r in range(1, experts + 1) if experts % r == 0]
    return Growth(groups, experts, after, cap, draw(st.sampled_from(ranks)), draw(st.sampled_from(before)))
