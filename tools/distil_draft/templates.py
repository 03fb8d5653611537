"""How prompts are worded: families of templates, with gaps for what tools.distil_draft.topics and .passages hold."""

from dataclasses import dataclass
from enum import StrEnum


class Tag(StrEnum):
    """What kind of text the answer is."""

    CHAT = "chat"  # prose: questions, stories, lists, beginnings of texts
    CODE = "code"  # programs that are new
    EDIT = "edit"  # much of the answer stands in the prompt already


@dataclass(frozen=True)
class Family:
    """`weight`: how often it is drawn. `is_chat` False: the text is continued as it is. `takes_style`: a sentence
    about form may follow."""

    name: str
    tag: Tag
    weight: int
    templates: tuple[str, ...]
    is_chat: bool = True
    takes_style: bool = False


FAMILIES = (
    Family(
        "questions",
        Tag.CHAT,
        4,
        (
            "What is the most important thing to know about $subject?",
            "Why does $subject matter?",
            "Tell me something surprising about $subject.",
            "What are common misunderstandings about $subject?",
            "I have to talk about $subject tomorrow. What should I say first?",
            "What would the world be like without $subject?",
            "How did people learn about $subject?",
            "Who should care about $subject, and why?",
        ),
        takes_style=True,
    ),
    Family(
        "explanations",
        Tag.CHAT,
        4,
        (
            "Explain $subject to $audience.",
            "Give me a short introduction to $subject for $audience.",
            "Describe $subject step by step.",
            "Can you explain $subject with an example from everyday life?",
            "Compare $subject with $subject2.",
            "What have $subject and $subject2 in common?",
            "Write a paragraph about $subject for a school magazine.",
            "Help $audience understand $subject.",
        ),
        takes_style=True,
    ),
    Family(
        "lists",
        Tag.CHAT,
        3,
        (
            "List $small facts about $subject.",
            "Give me $small questions for a quiz about $subject.",
            "Name $small words that have to do with $subject and say what each means.",
            "Make an outline of an essay about $subject.",
            "What are the advantages and disadvantages of $subject? Use bullet points.",
            "Suggest $small titles for a talk about $subject.",
            "Write a glossary of $small terms about $subject.",
            "Put together a numbered list of the main ideas behind $subject.",
        ),
    ),
    Family(
        "advice",
        Tag.CHAT,
        3,
        (
            "How can I $errand?",
            "I want to $errand. Where do I begin?",
            "Give me $small tips to $errand.",
            "What mistakes do people make when they $errand?",
            "My friend $name wants to $errand but has little time. What do you suggest?",
            "Write a plan for a week to $errand.",
            "What do I need to $errand?",
            "Is it hard to $errand?",
        ),
        takes_style=True,
    ),
    Family(
        "stories",
        Tag.CHAT,
        3,
        (
            "Write a short story about $hero.",
            "Tell me a bedtime story about $hero.",
            "Write the first paragraph of a novel about $hero.",
            "Write a poem about $hero.",
            "Write a dialogue between $name and $hero.",
            "Write a letter from $hero to $name in $city.",
            "Invent a fairy tale about $hero that ends well.",
            "Describe a day in the life of $hero.",
        ),
    ),
    Family(
        "sums",
        Tag.CHAT,
        2,
        (
            "$name has $number $thing and gives away $small. How many are left?",
            "A box holds $number $thing. How many $thing are in $small boxes?",
            "One ticket costs $price. What do $small tickets cost?",
            "$name walks $small kilometres an hour for $number minutes. How far is that?",
            "What is $number plus $small times $small?",
            "What is $small percent of $large?",
            "$name and $name2 share $number $thing. $name gets $small more. How many does each get?",
            "A train leaves $city at $small o'clock and travels for $number minutes. When does it arrive?",
        ),
    ),
    Family(
        "translations",
        Tag.CHAT,
        2,
        (
            'Translate into $tongue: "$sentence"',
            'How do I say "$sentence" in $tongue?',
            'What does "$sentence" mean? Say it in other words.',
            'Give the $tongue for "$sentence" and explain each word.',
            'Translate "$sentence" to $tongue and then back to English.',
            'Turn this sentence into a question or an answer: "$sentence"',
            'Write a short conversation that begins with "$sentence"',
            'I am learning $tongue. Please translate "$sentence" for me.',
        ),
    ),
    Family(
        "programs",
        Tag.CODE,
        6,
        (
            "Write a function in $language that $task.",
            "Write a $language program that $task.",
            "Show me how to write code that $task, in $language, with comments.",
            "I need a $language function that $task. Add an example of its use.",
            "Write a $language function that $task, and tests for it.",
            "Write a class in $language with a method that $task.",
            "How would you write something that $task in $language? Only code, please.",
            "Give me the simplest $language code that $task.",
        ),
    ),
    Family(
        "program explanations",
        Tag.CODE,
        2,
        (
            "What does this code do?\n\n$program",
            "Explain this code line by line.\n\n$program",
            "Find possible mistakes in this code.\n\n$program",
            "Write a test for this code.\n\n$program",
        ),
    ),
    Family(
        "program changes",
        Tag.EDIT,
        4,
        (
            "Add comments to this code.\n\n$program",
            "Rename the variables in this code so that it is easier to read.\n\n$program",
            "Add error handling to this code and print all of it.\n\n$program",
            "Change every number in this code to $number and print the result.\n\n$program",
            "Format this code cleanly.\n\n$program",
            "Here is some code:\n\n$program\n\nReplace the name `$identifier` by `data` everywhere.",
            "Rewrite this code to be shorter.\n\n$program",
            "Add documentation to this code and keep everything else.\n\n$program",
        ),
    ),
    Family(
        "summaries",
        Tag.EDIT,
        3,
        (
            "Summarise this text in one sentence.\n\n$passage",
            "What are the main points of this text?\n\n$passage",
            "$passage\n\nTL;DR",
            "Give this text a title and a summary of two sentences.\n\n$passage",
            "Read the text and answer: who, what, when and where?\n\n$passage",
            "Write down the most important number in this text and what it means.\n\n$passage",
            "Turn this text into bullet points.\n\n$passage",
            "Summarise for $audience:\n\n$passage",
        ),
    ),
    Family(
        "rewriting",
        Tag.EDIT,
        4,
        (
            "Rewrite this text so that it is $tone.\n\n$passage",
            "Correct spelling and grammar of this text.\n\n$passage",
            "Replace the name $name by $name2 in this text, and change nothing else.\n\n$passage",
            "Make this text $tone:\n\n$passage",
            "Repeat this text, but put it into the past tense.\n\n$passage",
            "Copy the text and mark every number with stars.\n\n$passage",
            "Rewrite this as an email to $name.\n\n$passage",
            "Continue this text with two more sentences, and print it all.\n\n$passage",
        ),
    ),
    Family(
        "extraction",
        Tag.EDIT,
        3,
        (
            'Extract names, places and numbers as JSON with the keys "names", "places", "numbers".\n\n$passage',
            "Turn the facts of this text into a JSON object.\n\n$passage",
            "Make a table with two columns, what and value, from this text.\n\n$passage",
            "Return a JSON array of the sentences of this text.\n\n$passage",
            "Fill in this form from the text: Name, City, Day, Amount.\n\n$passage",
            "Write the data of this text as YAML.\n\n$passage",
            "List every person and place in this text.\n\n$passage",
            'Answer only with JSON such as {"who": "...", "when": "..."}.\n\n$passage',
        ),
    ),
    Family(
        "prose beginnings",
        Tag.CHAT,
        2,
        (
            "$passage\n\n",
            "An introduction to $subject\n\n",
            "Once upon a time there was $hero. ",
            "How to $errand\n\nFirst,",
            "The history of $subject begins with",
            "Chapter 1\n\n$name had never thought about $subject until",
            "Frequently asked questions about $subject\n\nQ:",
            "The main reason why $subject",
        ),
        is_chat=False,
    ),
    Family(
        "program beginnings",
        Tag.CODE,
        2,
        (
            "# A function that $task\ndef",
            "// $language: a function that $task\n",
            "```python\n# This program $task.\n",
            "/* This function $task. */\n",
        ),
        is_chat=False,
    ),
)

STYLES = (
    "", "", "", "", "Keep it short.", "Answer in two sentences.", "Use simple words.", "Use bullet points.",
    "Answer in one paragraph.", "Give an example.", "Be precise.", "Please answer in detail.",
    "Use no more than fifty words.",
)  # fmt: skip

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a patient teacher. Answer clearly.",
    "You are an experienced programmer and writer.",
    "Answer briefly and politely.",
)

# Answers and further questions of longer conversations; the first message is a prompt of a family above.
REPLIES = (
    "Of course. Could you tell me a little more about what you need?",
    "Sure, I can help with that. Do you want a short or a long answer?",
    "Good question. It depends on the details, but I will try to give you a useful answer.",
    "Yes. Let me know who it is for, and I will write it that way.",
)
FOLLOW_UPS = (
    "A short answer is fine.",
    "It is for $audience.",
    "Please just begin, and make it $tone.",
    "Give me the answer first and the reasons afterwards.",
)
