"""What the verbs share; knows no command and no screen."""
