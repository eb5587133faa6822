"""What tests of budgets need: contracts, clocks, and a provider to run against."""
