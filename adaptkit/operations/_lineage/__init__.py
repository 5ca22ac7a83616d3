"""What an artifact was made from: found, walked, and made again."""
