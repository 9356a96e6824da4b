"""The pure functions: partition, mixup, linear solvers, hypergradients and the bi-level step; jax and optax only."""
