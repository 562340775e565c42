"""What each part of the method is worth, and static systems beside it."""
