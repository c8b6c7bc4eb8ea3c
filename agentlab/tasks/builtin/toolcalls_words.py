"""The words of `toolcalls`: phrasings and entities, in pools that have nothing in common."""

from agentlab.tasks.builtin.making import decimals, integers, pools

ENTITIES = {
    "weather.city": pools(
        """Lisbon, Oslo, Cairo, Madrid, Boston, Prague, Dublin, Athens, Mumbai, Seoul, Denver, Vienna, Lagos, Hanoi,
        Quito, Geneva, Riga, Tunis, Bogota, Manila, Havana, Perth, Porto, Malaga, Bergen, Tampa, Leeds,
        Kobe, Zagreb, Accra""",
        "Nairobi, Berlin, Toronto, Krakow, Lyon, Santiago, Dallas, Bristol, Jakarta, Tallinn",
        """Kyoto, Helsinki, Chicago, Naples, Lima, Sydney, Warsaw, Antwerp, Dakar, Portland, Munich, Glasgow, Osaka,
        Valencia, Austin, Bern""",
    ),
    "weather.days": integers(1, 30),
    "timer.minutes": integers(1, 120),
    "timer.label": pools(
        """pasta, laundry, tea, eggs, nap, yoga, rice, bread, homework, parking, bath, oven, coffee, plants,
        stretching, piano, chess, soup, reading, dishes, beans, violin, sauna, toast, roast, drawing,
        vocabulary, ironing""",
        "pizza, meditation, cookies, jogging, dryer, potatoes, juggling, potions",
        "lasagna, vacuuming, muffins, guitar, chili, gardening, steak, painting, noodles, boxing, waffles, sewing",
    ),
    "convert.amount": decimals(2, 99),
    "convert.to": pools(
        "EUR, USD, JPY, MXN, INR, GBP, NOK, CHF, TRY, ZAR, AED, KRW, PLN, BRL, THB, ILS, EGP, CLP, COP, PEN",
        "HUF, RSD, MYR, VND, DKK, KES",
        "SEK, CNY, CZK, SAR, NGN, BGN, AUD, CAD",
    ),
    "event.title": pools(
        """dentist, team lunch, haircut, budget review, book club, piano lesson, job interview, vet visit, tax
        meeting, car service, school play, project demo, eye test, house tour, staff party, board call,
        blood test, choir practice, flat viewing, town hall, wine tasting, sales pitch, bike repair, film
        night, chess match, roof check""",
        "physio session, garden fair, poetry evening, client visit, tyre change, music exam, campus walk, flu shot",
        """wedding rehearsal, bank appointment, swim class, design workshop, parents evening, boiler inspection,
        museum trip, tennis final, passport renewal, charity run, cooking course, launch briefing""",
    ),
    "event.hour": integers(0, 23),
    "music.artist": pools(
        """Adele, Queen, Coldplay, Nirvana, Beyonce, Mozart, Drake, Abba, Radiohead, Prince, Bach, Shakira, Eminem,
        Muse, Madonna, Chopin, Oasis, Rihanna, Genesis, Sting, Vivaldi, Metallica, Pink Floyd, Daft Punk,
        Bob Dylan, Elton John""",
        "Blur, Handel, Lorde, Kraftwerk, Joni Mitchell, Santana, Bjork, The Clash",
        """Nina Simone, Gorillaz, Debussy, Arcade Fire, Aretha Franklin, Portishead, Brahms, Massive Attack, Janis
        Joplin, Tame Impala, Fela Kuti, Blondie""",
    ),
    "light.room": pools(
        """kitchen, bedroom, garage, bathroom, hallway, office, attic, cellar, dining room, living room, nursery,
        garden, pantry, study, porch, stairs, workshop, guest room, studio, lobby""",
        "basement, balcony, closet, playroom, gym, shed",
        "library, conservatory, laundry room, driveway, terrace, music room, den, greenhouse",
    ),
    "message.to": pools(
        """Anna, Peter, Maria, Tom, Julia, Ahmed, Sofia, Lukas, Emma, Carlos, Nina, Oscar, Priya, Daniel, Lena,
        Ivan, Clara, Hugo, Mia, Samir, Paula, Felix, Rosa, Kenji, Laura, Marek, Alice, Ben""",
        "Greta, Omar, Diana, Victor, Yuki, Simon, Elif, Frank",
        "Hannah, Mateo, Ingrid, Rashid, Chloe, Dmitri, Amara, Quentin, Beatrix, Tariq, Wendy, Soren",
    ),
    "message.text": pools(
        """I am late, dinner is ready, the train is full, call me back, happy birthday, the keys are here, I got the
        job, see you soon, the door is open, we won, the cat is home, I need help, bring some milk, the
        file is sent, good luck, lunch is on me, I am outside, the bus left, all is well, we need bread,
        it is snowing, I found it""",
        "the shop is closed, I paid the rent, wait for us, the baby sleeps, my phone is broken, we have tickets",
        """the parcel arrived, I missed the flight, your coat is upstairs, we are stuck in traffic, the meeting
        moved, please water the roses, I booked a table, the exam went fine, our guests have left, the
        heating failed""",
    ),
    "split.total": decimals(20, 199),
    "split.people": integers(2, 40),
    "topic": pools(
        """black holes, photosynthesis, the French Revolution, jazz, volcanoes, penguins, democracy, chess openings,
        the Roman Empire, gravity, dinosaurs, poetry, the Silk Road, magnets, vaccines, rainbows,
        octopuses, opera, the Moon landing, inflation, glaciers, bees, Buddhism, impressionism, tides,
        vitamins, the Vikings, origami""",
        "earthquakes, honey badgers, the Cold War, sonnets, algebra, coral reefs, steam engines, Stoicism",
        """neutron stars, the Aztecs, fermentation, surrealism, owls, plate tectonics, haiku, the Industrial
        Revolution, antibiotics, whales, existentialism, the Great Wall, comets, bonsai trees""",
    ),
}

TEMPLATES = {
    "weather": {
        "train": [
            "What will the weather be in {city} for the next {days} days?",
            "Give me the {days} day forecast for {city}.",
            "Weather in {city}, {days} days please.",
            "Show the weather for {city} over {days} days.",
            "I am flying to {city}. How is the weather for {days} days?",
            "Check {city} weather for {days} days.",
            "Will it rain in {city} during the coming {days} days?",
            "For {days} days, tell me the forecast in {city}.",
            "{city} forecast, {days} days.",
            "I need a weather report: {city}, {days} days ahead.",
        ],
        "dev": [
            "How is the weather in {city} in the following {days} days?",
            "Forecast {days} days of weather for {city}.",
            "What weather should I expect in {city}? I want {days} days.",
            "Let me know the weather {days} days ahead in {city}.",
        ],
        "test": [
            "Could you look up {days} days of weather in {city}?",
            "Do I need an umbrella in {city}? Check the weather {days} days ahead.",
            "My trip to {city} lasts {days} days, what weather can I expect?",
            "Please get the weather forecast covering {days} days in {city}.",
            "What are the next {days} days like in {city}, weather wise?",
        ],
    },
    "timer": {
        "train": [
            "Set a timer for {minutes} minutes called {label}.",
            "Start a {minutes} minute timer for {label}.",
            "Timer for {label}: {minutes} minutes.",
            "I need a {label} timer, {minutes} minutes.",
            "Remind me about {label} in {minutes} minutes.",
            "{minutes} minutes for {label}, start now.",
            "Count down {minutes} minutes for the {label}.",
            "Please time my {label} for {minutes} minutes.",
            "Wake me after {minutes} minutes of {label}.",
            "Can you set {minutes} minutes on the timer for {label}?",
        ],
        "dev": [
            "Put {minutes} minutes on the clock for {label}.",
            "Begin a timer named {label} lasting {minutes} minutes.",
            "The {label} takes {minutes} minutes, set a timer.",
            "Ring in {minutes} minutes for {label}.",
        ],
        "test": [
            "Let a timer run {minutes} minutes for {label}.",
            "Tell me when {minutes} minutes of {label} are over.",
            "Make a new timer, {label}, of {minutes} minutes.",
            "My {label} should stop after {minutes} minutes, so start a timer.",
            "Could you alert me in {minutes} minutes for the {label}?",
        ],
    },
    "convert": {
        "train": [
            "Convert {amount} to {to}.",
            "How much is {amount} in {to}?",
            "Change {amount} into {to}.",
            "What is {amount} worth in {to}?",
            "I have {amount}, what is that in {to}?",
            "Exchange {amount} for {to}.",
            "Turn {amount} into {to} for me.",
            "Give me {amount} in {to}.",
            "Show me the value of {amount} in {to}.",
            "Please convert {amount} into {to}.",
        ],
        "dev": [
            "Calculate how much {amount} is in {to}.",
            "Swap {amount} of my money to {to}, please convert it.",
            "What do I get in {to} if I convert {amount}?",
            "Convert the sum of {amount} so that it is in {to}.",
        ],
        "test": [
            "If I change {amount}, how much {to} will I receive?",
            "Could you work out how much {amount} makes in {to}?",
            "I would like to convert {amount} and have it as {to}.",
            "Tell me how much {amount} would be in {to}.",
            "Money question: how much is {amount} when I convert it to {to}?",
        ],
    },
    "event": {
        "train": [
            "Add {title} to my calendar at {hour}.",
            "Put {title} in the calendar for {hour} o'clock.",
            "Schedule {title} at {hour}.",
            "I have a {title} at {hour}, save it.",
            "Create an event: {title}, hour {hour}.",
            "Book {title} for {hour} o'clock.",
            "Calendar: {title} at {hour}.",
            "Please plan {title} at {hour}.",
            "At {hour} there is {title}, add it to my calendar.",
            "New appointment at {hour}: {title}.",
        ],
        "dev": [
            "Note {title} in my diary for {hour} o'clock.",
            "Make a calendar entry {title} at {hour}.",
            "Reserve {hour} o'clock for the {title}.",
            "My {title} starts at {hour}, put it on the schedule.",
        ],
        "test": [
            "Could you enter {title} into my agenda at {hour}?",
            "Block {hour} o'clock on the calendar for {title}.",
            "Do not let me forget the {title} at {hour}, write it in my calendar.",
            "There will be a {title} at {hour}. Please record the event.",
            "Set up {title} for me, beginning at {hour} o'clock.",
        ],
    },
    "music": {
        "train": [
            "Play {artist} in {order} order.",
            "Put on {artist}, {order} mode.",
            "I want to hear {artist}, {order} please.",
            "Start music by {artist} with {order} order.",
            "Play some {artist} on {order}.",
            "{artist} songs, {order} order.",
            "Let us listen to {artist} in {order} mode.",
            "Can you play {artist}? Use {order}.",
            "Music please: {artist}, {order}.",
            "Queue {artist} and set {order}.",
        ],
        "dev": [
            "Stream music by {artist}, play it on {order}.",
            "Give me songs of {artist}, play them in {order} order.",
            "Set the music to {artist} with {order} order.",
            "Time for {artist}, play with {order}.",
        ],
        "test": [
            "I am in the mood for {artist}, play them in order {order}.",
            "Could we have {artist} songs playing in {order} order?",
            "Turn up the music of {artist} and choose {order}.",
            "Play something by {artist}, please, with the order set to {order}.",
            "Play tracks from {artist}; make it {order}.",
        ],
    },
    "light": {
        "train": [
            "Turn {on} the light in the {room}.",
            "Switch the {room} light {on}.",
            "Lights {on} in the {room}.",
            "Turn the {room} lamp {on}.",
            "Please switch {on} the {room} light.",
            "I want the light {on} in the {room}.",
            "{room} light {on}.",
            "Can you turn {on} the {room} lights?",
            "Set the {room} light to {on}.",
            "Make sure the {room} light is {on}.",
        ],
        "dev": [
            "The {room} light should be turned {on}.",
            "Put the lights {on} in the {room}.",
            "Flip the {room} lamp {on}.",
            "Have the light switched {on} in the {room}.",
        ],
        "test": [
            "Would you switch {on} the lamp in the {room}?",
            "I need the {room} lights turned {on}.",
            "In the {room}, the light has to be {on}.",
            "It is time to have the {room} lamp {on}.",
            "Get the light of the {room} {on}, please.",
        ],
    },
    "message": {
        "train": [
            "Tell {to}: {text}.",
            "Send {to} a message: {text}.",
            "Text {to} that {text}.",
            "Message {to}: {text}.",
            "Write to {to}: {text}.",
            "Let {to} know that {text}.",
            "Send a text to {to} saying {text}.",
            "Please tell {to} that {text}.",
            "Drop {to} a line: {text}.",
            "Message for {to}: {text}.",
        ],
        "dev": [
            "Inform {to} that {text}.",
            "Write {to} a note saying {text}.",
            "Can you text {to}: {text}?",
            "Pass this on to {to}: {text}.",
        ],
        "test": [
            "Could you message {to} and say {text}?",
            "I want {to} to know that {text}.",
            "Send word to {to}: {text}.",
            "Shoot {to} a quick text, {text}.",
            "Give {to} this message from me: {text}.",
        ],
    },
    "split": {
        "train": [
            "Split {total} among {people} people.",
            "Divide a bill of {total} by {people} people.",
            "We are {people} and the bill is {total}. Split it.",
            "Share {total} between {people} people.",
            "The bill is {total} for {people} people, what does each pay?",
            "How much does each of {people} people pay of {total}?",
            "Split the bill: {total}, {people} people.",
            "{people} people share a bill of {total}.",
            "Please divide {total} among {people} friends.",
            "Dinner cost {total}, split it for {people}.",
        ],
        "dev": [
            "Break a bill of {total} down for {people} people.",
            "{total} to be paid by {people} people, what is each share?",
            "Share the check of {total}, {people} of us.",
            "Work out the split of {total} for {people} guests.",
        ],
        "test": [
            "The restaurant wants {total} and there are {people} of us, so split it.",
            "Could you divide the check of {total} by {people} guests?",
            "What is everyone's part of {total} if {people} persons pay?",
            "Our group of {people} owes {total}. Share it equally.",
            "Let {people} of us pay {total} together, split evenly.",
        ],
    },
}

OTHER = {
    "train": [
        "Explain {topic} in one sentence.",
        "Who discovered {topic}?",
        "Write a short poem about {topic}.",
        "What is interesting about {topic}?",
        "Why do people like {topic}?",
        "Tell me a joke about {topic}.",
        "Give me three facts about {topic}.",
        "What should I read about {topic}?",
        "Summarize the history of {topic}.",
        "How would you teach {topic} to a child?",
    ],
    "dev": [
        "What do experts say about {topic}?",
        "Describe {topic} briefly.",
        "Do you find {topic} difficult?",
        "Invent a story with {topic}.",
    ],
    "test": [
        "What are common myths about {topic}?",
        "I am curious about {topic}, can you explain?",
        "Compose a limerick on {topic}.",
        "Why is {topic} worth studying?",
        "Name a good museum for {topic}.",
    ],
}
"""Requests for which the catalogue has no tool at all."""
