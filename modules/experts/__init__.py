"""A mixture of experts: router, experts, balance."""
