"""The HTTP surface: one exact route table (`app`), one file per surface, one shape of errors (`errors`)."""
