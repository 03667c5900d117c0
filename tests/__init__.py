"""The tests, in the folders of what they test; `cases` holds what several share."""
