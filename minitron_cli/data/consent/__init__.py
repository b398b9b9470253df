"""What a corpus may be used for: agents, signals beside robots.txt, domain view, terms of service, audit."""
