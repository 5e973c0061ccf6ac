"""From an adapter to something that can be deployed: merged, exported, checked against its source."""
