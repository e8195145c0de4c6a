"""`tknp serve`: every part of the system as processes of this machine, watched over until they are all gone again."""
