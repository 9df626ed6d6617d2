"""Small models with known log p(x), and a judge of estimators of it; see README.md."""
