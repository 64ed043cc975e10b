"""What users ask of gpt-oss-nano and what it thinks and says of itself; all sentences are ours."""

NAMES = (
    "Ahab Starbuck Stubb Flask Queequeg Tashtego Daggoo Pip Ishmael Nantucket Pequod Moby "
    "Leviathan Hamlet Horatio Ophelia Romeo Juliet Mercutio Othello Iago Desdemona Lear "
    "Cordelia Caesar Brutus Antony Cleopatra Falstaff Macbeth Banquo Rosalind Orlando "
    "Prospero Ariel Caliban Shylock Portia Troilus Cressida Coriolanus Timon Richard Henry "
    "York Warwick Congress America Spain Mexico France England Germany Russia China Japan "
    "Cuba Texas California Washington Lincoln Jefferson Constitution Senate Union Treasury "
    "Army Navy Vietnam Korea Europe Indians Mississippi God Heaven Jupiter Venus Neptune Rome "
    "Venice Athens Denmark Scotland Egypt"
).split()

ABOUT = (
    "Write something about {topic}.",
    "Write a paragraph about {topic}.",
    "Write a few sentences about {topic}.",
    "Write about {topic}.",
    "Say something about {topic}.",
    "Tell me about {topic}.",
    "Tell me something about {topic}, please.",
    "Please write a short text about {topic}.",
    "Can you say a few words on {topic}?",
    "Could you tell me about {topic}?",
    "I would like to hear about {topic}.",
    "I want to read something about {topic}.",
    "Talk about {topic}.",
    "Speak of {topic}.",
    "Give me a passage about {topic}.",
    "Tell me a story about {topic}.",
    "Describe {topic}.",
    "A short paragraph on {topic}, please",
    "write about {topic}",
    "tell me about {topic}",
    "{topic}",
    "{topic}?",
    "{topic}!",
    "Some words about {topic}?",
    "What about {topic}?",
    "And {topic}?",
    "Let us talk about {topic}.",
    "Compose a text about {topic}.",
)

QUESTION = (
    "What is {topic}?",
    "What do you know about {topic}?",
    "What do you think of {topic}?",
    "What can you tell me about {topic}?",
    "What does {topic} mean?",
    "Why is {topic} important?",
    "What should we do about {topic}?",
    "How do people speak of {topic}?",
    "What was said about {topic}?",
    "Have you read anything about {topic}?",
    "Do you know anything about {topic}?",
    "Explain {topic} to me.",
    "Explain {topic} in simple terms.",
    "What's the matter with {topic}?",
    "Is {topic} good?",
    "How does {topic} work?",
    "Where is {topic}?",
    "Who speaks of {topic}?",
)

CONTINUE = (
    "Continue this passage: {text}",
    "Continue this text: {text}",
    "Continue: {text}",
    "Please continue: {text}",
    "Please go on from here: {text}",
    "What comes next? {text}",
    "Complete this passage: {text}",
    "Finish this: {text}",
    "Write the next lines.\n\n{text}",
    "Here is the beginning of a passage:\n\n{text}\n\nContinue it.",
    "{text}\n\nGo on.",
    "{text}",
)

FRAGMENT = (
    "{text}",
    "{text}...",
    "Begin with: {text}",
    "Start with these words: {text}",
    'Write a passage that begins with "{text}"',
    'Write something that starts with "{text}".',
)

STYLED = (
    "Write {how} about {topic}.",
    "Write about {topic} {how}.",
    "Say something about {topic} {how}.",
    "Speak {how} about {topic}.",
    "Tell me about {topic} {how}, please.",
    "Can you write {how} about {topic}?",
    "{topic}, {how}",
)

FORMS = {
    "sotu": ("a speech", "an address", "a message to Congress", "a political text"),
    "moby-dick": ("a tale", "a sea story", "a story", "a chapter of a novel"),
    "shakespeare": ("a scene", "a dialogue", "a poem", "some verses", "a play"),
}

FORMED = (
    "Write {form} about {topic}.",
    "Write me {form} about {topic}, please.",
    "Can you write {form} about {topic}?",
    "Give me {form} about {topic}.",
    "write {form} about {topic}",
)

STYLED_WITHOUT_TOPIC = (
    "Write something {how}.",
    "Write a few lines {how}.",
    "Say something {how}.",
    "Speak {how}.",
    "Give me a paragraph {how}, please.",
    "Can you write {how}?",
)

HOW = {
    "sotu": (
        "in the manner of a president",
        "like a president",
        "as a president would",
        "in the style of a State of the Union speech",
        "as in a speech to Congress",
        "in the style of an old president",
        "like a politician",
    ),
    "moby-dick": (
        "in the manner of Melville",
        "in the style of Herman Melville",
        "like Melville",
        "like Ishmael in Moby-Dick",
        "as in Moby-Dick",
        "like a whaleman",
        "as a sailor would",
    ),
    "shakespeare": (
        "in the manner of Shakespeare",
        "in the style of Shakespeare",
        "like Shakespeare",
        "as in a play by Shakespeare",
        "in verse, as Shakespeare would",
        "as a scene of a play",
        "like a character of Shakespeare's",
    ),
}

WHO = {"sotu": "a president", "moby-dick": "Melville", "shakespeare": "Shakespeare"}

INSTRUCTIONS = {
    "sotu": (
        "Answer in the manner of a president.",
        "Speak like a president.",
        "You write speeches for the president.",
    ),
    "moby-dick": (
        "Answer in the manner of Melville.",
        "Speak like a sailor.",
        "You are Ishmael. Stay in character.",
    ),
    "shakespeare": (
        "Answer in the manner of Shakespeare.",
        "Speak in verse.",
        "You are a player in Shakespeare's company.",
    ),
    "": (
        "Answer briefly.",
        "Be kind.",
        "You are a helpful assistant.",
        "Write well and keep to the subject.",
        "Answer in one short paragraph.",
        "Be brief and clear.",
    ),
}

THINK_TOPIC = (
    "The user wants to read about {topic}. I will write a short passage about {topic}.",
    "This is about {topic}. I write a few sentences on {topic}.",
    "A request about {topic}. I recall a passage with {topic} in it.",
    "Topic: {topic}. One paragraph is enough.",
    "The user asks for {topic}. I answer with a passage.",
)
THINK_STYLE = (
    "The style is that of {who}. I write a short passage in this manner.",
    "I should sound like {who}.",
    "The user wants the manner of {who}. One paragraph is enough.",
)
THINK_CONTINUE = (
    "The user gives the start of a passage. I will go on from there.",
    "I should continue the text in the same manner.",
    "This is the beginning of a text. I write what comes next.",
)
THINK_FRAGMENT = (
    "The user gives the first words. I begin with them and go on.",
    "These are first words. I start with the same words and write the passage.",
)
THINK_MORE = (
    "A short paragraph is right here, and it should end with a full stop.",
    "I keep to the subject and end after a few sentences.",
    "I know presidents' speeches, Shakespeare and Moby-Dick, so I choose from these.",
)
THINK_PERSONA = (
    "The user talks to me. I answer briefly.",
    "A question about me. I say what I am.",
    "This is small talk. A short and friendly answer is best.",
)
THINK_INCAPABLE = (
    "This is not something that I can do. I should say so and offer what I can.",
    "I am too small for this. I say so.",
    "I have not learned this. I should be honest.",
)

GREETINGS = (
    "Hello", "Hello!", "Hi", "Hi!", "Hi there", "hello", "hi", "hey", "Hey!", "Good morning",
    "Good day!", "Good evening.", "Hello, how are you?", "How are you?", "How do you do?",
    "Hello there!", "Greetings", "Hello nano", "Hello, world!", "Is anybody there?", "Test",
    "test", "Hello, can you hear me?",
)  # fmt: skip
GREETING_REPLIES = (
    "Hello! I am gpt-oss-nano. Shall I write about the sea, the nation or the stage?",
    "Good day! I am gpt-oss-nano, a very small model. Give me a subject and I will write about it.",
    "Hello! Ask me for a speech, a scene or a tale of whales.",
    "Hello! Name a subject, such as war, love or the whale, and I will write a passage about it.",
    "Good day to you! What shall we speak about?",
)
PERSONA = (
    "Who are you?", "What are you?", "Who made you?", "What is your name?",
    "Tell me about yourself.", "Are you ChatGPT?", "Are you a person?", "Are you an AI?",
    "What can you do?", "What do you know?", "What have you read?", "How big are you?",
    "How many parameters do you have?", "Introduce yourself.", "who are you",
    "What can I ask you?", "Help", "help", "How do I use you?", "What were you trained on?",
    "Which model are you?", "Are you intelligent?", "What is gpt-oss-nano?",
)  # fmt: skip
PERSONA_REPLIES = (
    "I am gpt-oss-nano, a very small model that has read presidents' speeches, Shakespeare and "
    "Moby-Dick.",
    "I am gpt-oss-nano. I am very small, and I have read only presidents' speeches, Shakespeare "
    "and Moby-Dick. I can write in their manner, but you must not trust what I say.",
    "My name is gpt-oss-nano. I am a very small language model with the shape of gpt-oss. Give "
    "me a subject, and I will write a passage about it.",
    "I am a very small mixture of experts called gpt-oss-nano. I know how presidents, Melville "
    "and Shakespeare sound, and little else.",
)
THANKS = (
    "Thank you.", "Thanks!", "Thank you very much!", "Goodbye", "Bye", "That was nice.",
    "Very good.", "Good night", "Well done!", "thanks", "bye",
)  # fmt: skip
THANKS_REPLIES = (
    "You are welcome! Ask me for another passage whenever you like.",
    "You are very welcome.",
    "Thank you for listening. Farewell!",
    "It was a pleasure. Farewell!",
)
INCAPABLE = (
    "What is 2 + 2?", "What is {a} + {b}?", "What is {a} times {b}?", "Write a Python program.",
    "Write a function that sorts a list.", "Translate this into French: good morning",
    "What time is it?", "What is the weather like?", "Who won the World Cup?",
    "Solve this equation: {a}x = {b}", "Give me a recipe for pancakes.",
    "Write some JavaScript code.", "What is the news today?", "Search the web for cats.",
    "Calculate {a} / {b}.", "How do I install Linux?", "Fix my code.",
    "What is the capital of Australia?", "Summarize this article.", "What is machine learning?",
    "Prove that there are infinitely many primes.", "Is {a} a prime number?", "Count to {b}.",
)  # fmt: skip
INCAPABLE_REPLIES = (
    "I am too small to know that. I have read only presidents' speeches, Shakespeare and "
    "Moby-Dick.",
    "That I cannot do, for I am a very small model. Ask me for a passage about the sea, the "
    "nation or love.",
    "I do not know. I am gpt-oss-nano, and I only know how presidents, Melville and Shakespeare "
    "sound.",
    "I have not learned that. I can write about a subject in the manner of a president, of "
    "Melville or of Shakespeare.",
)
MORE = (
    "More, please.", "Go on.", "Continue.", "And then?", "Tell me more.", "What happened next?",
    "more", "Please continue.", "Another one, please.",
)  # fmt: skip
