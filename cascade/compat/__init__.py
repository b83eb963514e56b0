"""Other programs' ways of sampling, for comparison, and for users who come from there. Nothing else imports this folder."""
