"""`case-fast bench decode`: replies of a trained model to real dialogues, against its decoder as such code is usually written."""
