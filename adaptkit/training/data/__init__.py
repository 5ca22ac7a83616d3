"""Training data: what files hold, as samples, and which of them a step trains on."""
