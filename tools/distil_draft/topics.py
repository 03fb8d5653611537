"""What prompts are about: subjects, programming tasks and the words that fill gaps. All written for this purpose."""

SUBJECTS = (
    "photosynthesis", "the water cycle", "volcanoes", "the Roman Empire", "black holes", "vaccines", "glaciers",
    "the printing press", "honey bees", "earthquakes", "compound interest", "the French Revolution", "DNA",
    "solar panels", "coral reefs", "the human heart", "supply and demand", "magnetism", "rainbows", "sourdough bread",
    "chess openings", "the Silk Road", "electric cars", "the immune system", "tides", "inflation", "dinosaurs",
    "the Moon landing", "lightning", "recycling", "neural networks", "the Great Wall of China", "antibiotics",
    "migrating birds", "jazz music", "the periodic table", "wind turbines", "the ozone layer", "Shakespeare's plays",
    "public libraries", "bicycles", "coffee growing", "the Industrial Revolution", "whales", "batteries", "democracy",
    "the digestive system", "deserts", "cheese making", "satellites", "the Olympic Games", "probability",
    "rainforests", "steam engines", "sleep", "the stock market", "mushrooms", "bridges", "the Renaissance", "gravity",
    "computer viruses", "tea ceremonies", "the solar system", "lighthouses", "evolution", "insurance", "origami",
    "the nervous system", "comets", "ancient Egypt", "beekeeping", "nuclear energy", "sign language", "soil erosion",
    "opera", "the Vikings", "sound waves", "hot air balloons", "the Mediterranean diet", "telescopes", "rice farming",
    "the alphabet", "friction", "marathon running", "wolves", "glass blowing", "the Cold War", "clouds",
    "prime numbers", "mangrove forests", "radio", "the kidneys", "castles", "data compression", "penguins", "taxes",
)  # fmt: skip

ERRANDS = (
    "plan a birthday party", "learn the guitar", "save money on groceries", "prepare for a job interview",
    "train a puppy", "start a vegetable garden", "sleep better", "clean a bicycle chain", "write a thank-you note",
    "pack for a week of hiking", "study for an exam", "cook a simple curry", "choose a laptop", "stop procrastinating",
    "paint a bedroom", "make friends in a new city", "fix a dripping tap", "give a short speech", "run five kilometres",
    "organise old photos", "read more books", "move house", "take care of a cactus", "brew good coffee",
    "plan a road trip", "keep a diary", "learn a new language", "sew on a button", "teach a child to swim",
    "reduce plastic waste", "invite the neighbours for dinner", "remember people's names", "cycle to work in winter",
    "bake bread without a machine", "negotiate a salary", "set up a home office", "adopt a cat", "learn to juggle",
    "write a complaint to a shop", "get up early",
)  # fmt: skip

PROGRAMMING_TASKS = (
    "reverses a string", "checks whether a number is prime", "counts the words in a text",
    "finds the largest item of a list", "computes the factorial of a number", "sorts a list of names by length",
    "removes duplicates from a list", "converts Celsius to Fahrenheit", "checks whether a word is a palindrome",
    "merges two sorted lists", "computes the nth Fibonacci number", "sums the digits of a number",
    "reads a file and prints its longest line", "groups words by their first letter", "computes the mean and median",
    "validates an email address", "flattens a nested list", "finds the greatest common divisor of two numbers",
    "counts how often each letter occurs", "performs binary search", "converts a Roman numeral to a number",
    "rotates a matrix by 90 degrees", "splits a list into chunks of a given size", "generates a random password",
    "checks whether brackets are balanced", "computes the distance between two points", "parses a CSV line",
    "implements a stack", "implements a queue with two stacks", "caches the results of a function",
    "retries a function up to three times", "formats a number of seconds as hours and minutes",
    "finds all anagrams of a word in a list", "transposes a table", "finds the second largest number",
    "removes all vowels from a string", "counts the nodes of a binary tree", "reverses a linked list",
    "prints a multiplication table", "checks whether a year is a leap year", "converts a number to binary",
    "capitalises every word of a sentence", "computes compound interest", "finds the shortest path in a grid",
    "finds the intersection of two sets", "simulates rolling two dice", "shuffles a deck of cards",
    "encodes a text with a Caesar cipher",
)  # fmt: skip

HEROES = (
    "a lighthouse keeper who is afraid of the dark", "a robot that learns to paint", "two sisters and a lost map",
    "a fox who opens a bakery", "a clock that runs backwards", "an old sailor on his last voyage",
    "a girl who can talk to trains", "a dragon that collects teacups", "a detective without a sense of smell",
    "a village where it never rains", "a librarian who finds a talking book", "a cat that travels to the Moon",
    "a violin that nobody can play", "a shy giant in a small town", "a letter that arrives fifty years late",
    "a gardener who grows clouds", "a boy who builds a boat in the attic", "a queen who wants to be a cook",
    "a snowman in July", "a thief who only steals sounds", "an astronaut who misses the sea",
    "a baker and a very small elephant", "a bridge that remembers everyone", "a postman on a flying bicycle",
)  # fmt: skip

SENTENCES = (
    "Where is the nearest train station?", "I would like a cup of tea, please.", "The weather is lovely today.",
    "My brother works in a hospital.", "How much does this cost?", "We will meet in front of the museum at noon.",
    "The children are playing in the garden.", "I have lost my keys.", "She is reading a book about the stars.",
    "Can you help me with my luggage?", "The shop closes at six o'clock.", "I have been learning for two years.",
    "Please speak a little more slowly.", "Dinner is ready.", "The red car belongs to our neighbour.",
    "It was a pleasure to meet you.", "Tomorrow I am going to the dentist.", "There are too many people on this bus.",
    "The bread smells wonderful.", "He forgot to close the window.", "What time does the film start?",
    "We moved here last autumn.", "The dog sleeps under the table.", "I prefer mountains to beaches.",
)  # fmt: skip

# Words that fill gaps. They are shared by the two halves: a prompt is held out by its template and its subject.
FILLERS: dict[str, tuple[str, ...]] = {
    "language": ("Python", "JavaScript", "Java", "C", "C++", "Go", "Rust", "Ruby", "TypeScript", "Python", "Python"),
    "tongue": ("French", "Spanish", "German", "Italian", "Portuguese"),
    "audience": ("a child", "a beginner", "my grandmother", "a student", "a busy manager", "a curious teenager"),
    "tone": ("more formal", "friendlier", "shorter", "simpler", "more polite", "more enthusiastic", "clearer"),
    "name": ("Ada", "Ben", "Chloe", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kiran", "Lucia",
             "Mona", "Nils", "Olga", "Pedro", "Rosa", "Samir", "Tara", "Victor"),
    "surname": ("Abbott", "Berg", "Costa", "Duval", "Ekman", "Fisher", "Garcia", "Holm", "Ivanova", "Jensen", "Khan",
                "Lind", "Moreau", "Novak", "Okafor", "Price"),
    "city": ("Lisbon", "Oslo", "Chicago", "Nairobi", "Kyoto", "Dublin", "Lyon", "Toronto", "Lima", "Hamburg", "Athens",
             "Seoul", "Bristol", "Porto"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("January", "March", "April", "May", "June", "August", "September", "October", "December"),
    "thing": ("apples", "books", "pencils", "tickets", "cookies", "marbles", "bottles", "chairs", "stamps", "lamps"),
    "small": tuple(map(str, range(3, 13))),
    "number": tuple(map(str, range(12, 96, 7))),
    "large": tuple(f"{n},000" for n in range(2, 48, 3)),
    "price": tuple(f"{n}.{c}" for n, c in zip(range(3, 60, 4), ("50", "99", "20", "75", "00") * 3, strict=True)),
    "identifier": ("items", "values", "records", "scores", "entries", "rows", "orders", "prices"),
    "function": ("process", "compute", "collect", "handle", "update", "select", "convert", "summarise"),
}  # fmt: skip
