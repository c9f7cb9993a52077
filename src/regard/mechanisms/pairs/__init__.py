"""Two inputs that look at each other: frames, views, a picture and a question."""
