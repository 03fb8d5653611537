"""Texts and programs that prompts ask to shorten, change or read: written for this purpose, with gaps to fill."""

# A scene is told in order; one of its middle sentences may be left out.
SCENES = (
    (
        "The old cinema on Harbour Street in $city will reopen on $day after $small months of repairs.",
        "The owner, $name $surname, paid for a new roof and $number seats.",
        "Visitors had collected more than $large signatures to save the building.",
        "The first film will be shown free of charge, and a ticket will cost $price afterwards.",
        "A café in the entrance hall is planned for $month.",
    ),
    (
        "$name $surname joined our company in $city in $month as head of logistics.",
        "Before that she had led a team of $number people at a shipping firm.",
        "Her first project was a new warehouse that cut delivery times by $small days.",
        "She thinks that small changes, made every week, matter more than big plans.",
        "In her free time she repairs old radios.",
    ),
    (
        "hi $name, sorry for the late answer, i was ill since $day.",
        "i looked at the numbers and i think theres a mistake in table two, it should be $number and not $small.",
        "can you check it before the meeting and send me the new version?",
        "also we still need somebody who talks to the people in $city.",
        "thanks, $name2",
    ),
    (
        "The river near $city rose by $small metres during the storm on $day.",
        "About $number houses were flooded, and the main bridge was closed.",
        "Firefighters brought $large people to schools and sports halls.",
        "Nobody was hurt, but the repairs are expected to last until $month.",
        "The mayor, $name $surname, thanked the volunteers.",
    ),
    (
        "Order $number was placed by $name $surname on $day.",
        "It contains $small $thing at $price each and a delivery to $city.",
        "The customer asks to leave the parcel with the neighbour if nobody is at home.",
        "Payment is due at the end of $month.",
    ),
    (
        "Researchers in $city followed $large volunteers for $small years to find out how walking affects memory.",
        "Those who walked at least $number minutes a day did better in most tests.",
        "The effect was strongest among people over sixty.",
        "The authors warn that other habits may explain part of the difference.",
        "A larger study will begin in $month.",
    ),
    (
        "Our train left $city an hour late, and the heating did not work.",
        "$name had brought soup in a flask, which we shared with a family from the next compartment.",
        "Somewhere in the mountains we stopped for $number minutes because of a cow on the track.",
        "When we finally arrived it was dark, but the landlady had waited with dinner.",
        "It was the best journey of my life, although I had lost all my $thing.",
    ),
    (
        "The weekly meeting of the garden club took place on $day with $small members.",
        "$name $surname reported that the new greenhouse costs $large euros.",
        "The club decided to sell $thing at the market in $month to pay for it.",
        "The next meeting is in $city.",
    ),
    (
        "Patient $name $surname, aged $number, came to the clinic in $city on $day with a sore knee.",
        "The pain began $small weeks ago after a long run.",
        "There is no swelling, and the X-ray shows nothing unusual.",
        "Rest and light exercise are recommended, with another visit in $month.",
    ),
    (
        "The $city Hawks won their match on $day by $number points.",
        "Captain $name $surname scored in the first minute and again shortly before the end.",
        "The visitors had missed $small players because of injuries.",
        "More than $large people watched the game in heavy rain.",
        "The final takes place in $month.",
    ),
    (
        "Dear Mr $surname, I am writing because the washing machine that I bought in $month does not work any more.",
        "It stops after $number minutes, and the door stays locked.",
        "I have called your service $small times and nobody has come.",
        "Please repair it by $day or give me my money back.",
        "Yours sincerely, $name",
    ),
    (
        "The museum of toys in $city shows $large objects from two centuries.",
        "Most of them were given by a single collector, $name $surname.",
        "Children may play with copies of $small wooden trains.",
        "The museum is closed on $day, and a ticket costs $price.",
    ),
    (
        "To make the dough, mix $small cups of flour with a spoon of salt and some warm water.",
        "Let it rest for $number minutes under a cloth.",
        "Then roll it out, cut it into squares and bake them until they are golden.",
        "$name likes to serve them with soup on a cold $day.",
    ),
    (
        "The app crashed $small times on $day when users in $city opened their profile.",
        "The cause was a date in $month that was read as text.",
        "$name $surname corrected it within $number minutes, and nobody lost data.",
        "We will add a test so that it cannot happen again.",
    ),
    (
        "My grandfather kept bees behind the school in a village near $city.",
        "Every $day he opened the $small hives and spoke to them quietly.",
        "In a good year he sold $number jars of honey at $price each.",
        "After his death my cousin $name took over, and the bees did not seem to mind.",
    ),
    (
        "The council of $city wants to plant $large trees by next $month.",
        "Each street is to get at least $small of them.",
        "$name $surname of the parks department says that they cool the air by several degrees.",
        "Some shop owners fear that parking spaces will be lost.",
        "The vote is on $day.",
    ),
)

# (language, program)
PROGRAMS = (
    (
        "python",
        "def $function($identifier):\n    result = []\n    for x in $identifier:\n        if x > $small:\n"
        "            result.append(x * 2)\n    return result",
    ),
    (
        "python",
        "def ${function}_total($identifier, tax):\n    total = 0\n    for item in $identifier:\n"
        "        total = total + item['price'] * item['count']\n    total = total + total * tax\n    return total",
    ),
    (
        "javascript",
        "function $function($identifier) {\n  var out = [];\n  for (var i = 0; i < $identifier.length; i++) {\n"
        "    if ($identifier[i].active == true) {\n      out.push($identifier[i].name);\n    }\n  }\n  return out;\n}",
    ),
    (
        "python",
        "class Account:\n    def __init__(self, owner):\n        self.owner = owner\n        self.balance = $small\n\n"
        "    def deposit(self, amount):\n        self.balance = self.balance + amount\n\n"
        "    def withdraw(self, amount):\n        self.balance = self.balance - amount",
    ),
    (
        "java",
        "public static int $function(int[] $identifier) {\n    int best = $identifier[0];\n"
        "    for (int i = 0; i < $identifier.length; i++) {\n        if ($identifier[i] > best) {\n"
        "            best = $identifier[i];\n        }\n    }\n    return best;\n}",
    ),
    (
        "python",
        "import json\n\ndef load_$identifier(path):\n    f = open(path)\n    data = json.load(f)\n    f.close()\n"
        "    names = []\n    for row in data:\n        names.append(row['name'])\n    return names",
    ),
    (
        "sql",
        "SELECT name, city, SUM(price) AS total\nFROM $identifier\nWHERE price > $number\nGROUP BY name, city\n"
        "ORDER BY total DESC\nLIMIT $small;",
    ),
    (
        "python",
        "def $function(text):\n    counts = {}\n    for word in text.split():\n        if word in counts:\n"
        "            counts[word] = counts[word] + 1\n        else:\n            counts[word] = 1\n    return counts",
    ),
    (
        "go",
        "func $function($identifier []int) int {\n\tsum := 0\n\tfor i := 0; i < len($identifier); i++ {\n"
        "\t\tsum += $identifier[i]\n\t}\n\treturn sum / len($identifier)\n}",
    ),
    (
        "html",
        '<div class="card">\n  <h2>$name $surname</h2>\n  <p>Lives in $city</p>\n  <ul>\n    <li>$number $thing</li>\n'
        "    <li>$price euros</li>\n  </ul>\n</div>",
    ),
    (
        "python",
        "def $function(n):\n    a, b = 0, 1\n    while a < n:\n        print(a)\n        a, b = b, a + b\n\n"
        "$function($number)",
    ),
    (
        "c",
        "int $function(const char *s) {\n    int n = 0;\n    for (int i = 0; s[i] != '\\0'; i++) {\n"
        "        if (s[i] == ' ') {\n            n = n + 1;\n        }\n    }\n    return n;\n}",
    ),
    (
        "python",
        "def is_valid(password):\n    if len(password) < $small:\n        return False\n"
        "    if password.lower() == password:\n        return False\n    return True",
    ),
    (
        "yaml",
        "service:\n  name: $identifier\n  port: 80$number\n  replicas: $small\n  owner: $name\n  region: $city",
    ),
    (
        "javascript",
        "const $identifier = [$small, $number, 7];\nlet sum = 0;\n"
        "$identifier.forEach(function (x) {\n  sum += x;\n});\nconsole.log(sum / $identifier.length);",
    ),
    (
        "python",
        "def $function(matrix):\n    rows = len(matrix)\n    cols = len(matrix[0])\n    out = []\n"
        "    for c in range(cols):\n        row = []\n        for r in range(rows):\n"
        "            row.append(matrix[r][c])\n        out.append(row)\n    return out",
    ),
)
