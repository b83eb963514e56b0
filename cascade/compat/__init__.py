"""Other programs' ways of sampling, for comparison and for whoever moves from there. Nothing else imports this folder."""
