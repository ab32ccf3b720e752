"""Expert upcycling inside a running job: plan, transform, verify."""
