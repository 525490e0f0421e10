"""The words and plots of the stories that the bundled model learns from.

In a text, `[a|b]` is a choice and `{slot}` a value that stays the same through the story. A story is a list of beats
with a blank line between them; each line of a beat is one way to tell it.
"""


def words(text: str) -> list[str]:
    """Words between spaces, `_` standing for a space within one."""
    return [word.replace("_", " ") for word in text.split()]


PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "it": {"he": "it", "him": "it", "his": "its", "himself": "itself"},
}
NAMES = {
    "she": words("Mia Lily Anna Ruby Nora Ella Rosa Clara Ivy Maya Zoe Hana Sofia Luna Alice Emma Grace Ada Lucy Wren"),
    "he": words("Tom Max Leo Ben Sam Oscar Finn Hugo Felix Noah Jack Theo Milo Otto Pip Arlo Peter Henry Omar Kenji"),
    "it": words("Bolt Bip Rusty Dot Sprocket Tik Pixel Zip"),
}
ANIMALS = words(
    "fox rabbit owl mouse bear hedgehog cat dog duck frog squirrel turtle otter goat crow badger dragon penguin"
)
WOMEN = words("baker gardener painter astronaut sailor farmer librarian teacher clockmaker queen princess witch")
MEN = words("clockmaker baker sailor farmer fisherman lighthouse_keeper astronaut gardener shepherd king prince wizard")
TRAITS = words("little young kind clever shy brave quiet curious cheerful lonely small gentle")
THINGS = (
    "[brass|silver|tiny] key",
    "[red|blue|yellow] kite",
    "[old|little|green] lantern",
    "[old|paper] map",
    "[silver|brass] bell",
    "[golden|blue] button",
    "[brass|shiny] compass",
    "[red|small] drum",
    "[thick|green] book",
    "[red|yellow|blue] umbrella",
    "[long|red|woollen] scarf",
    "[small|silver] music box",
    "[wooden|silver] flute",
    "[glass|green] marble",
    "[white|pink] shell",
    "[tall|blue] hat",
    "[golden|white] feather",
    "[wooden|red] boat",
    "[silver|golden] watch",
    "[round|red] ball",
)
FOODS = (
    ("[honey|lemon|carrot] cake", "cake"),
    ("loaf of [warm|fresh] bread", "bread"),
    ("[apple|cherry|plum] pie", "pie"),
    ("pot of [hot|pumpkin|mushroom] soup", "soup"),
    ("basket of [ripe|sweet] berries", "basket"),
    ("round yellow cheese", "cheese"),
    ("bag of [roasted|brown] nuts", "bag"),
    ("box of ginger biscuits", "box"),
)
INVENTIONS = (
    ("lantern that never went out", "lantern"),
    ("kettle that could sing", "kettle"),
    ("boat with four wheels", "boat"),
    ("chair that could fly", "chair"),
    ("clock that told stories", "clock"),
    ("machine that painted rainbows", "machine"),
    ("bell that rang before the rain", "bell"),
    ("broom that danced by itself", "broom"),
)
WEATHER = "[[spring|summer|autumn|winter] [morning|evening|day]"
WEATHER += (
    "|[rainy|windy|foggy|cold|warm|quiet] [morning|afternoon|evening|night]|[sunny|bright] [morning|afternoon|day]]"
)
CALM = "[quiet|cold|bright|silent] [morning|evening|night]"
PLACES = (
    ("[|deep ]in the forest", "the forest", "[under|behind|beside] [a mossy log|a hollow oak|a patch of ferns]"),
    ("by the sea", "the beach", "[behind|beside] [a wet rock|a small boat|a pile of seaweed]"),
    ("in a small village", "the village", "[behind|beside] [the well|the old bakery|the garden wall|the gate]"),
    ("high in the mountains", "the mountain", "[under|behind] [a grey stone|a small pine tree|a wall of rock]"),
    ("near a wide river", "the river", "[under|beside] [the wooden bridge|a willow tree|a heap of pebbles]"),
    ("in an old lighthouse", "the lighthouse", "[under|behind] [the winding stairs|the great lamp|a coil of rope]"),
    ("on the moon", "the moon", "[behind|beside] [a round crater|a silver rock|a hill of dust]"),
    ("at the edge of the desert", "the desert", "[behind|beside] [a sand dune|a tall cactus|a warm stone]"),
    ("in a busy town", "the town", "[behind|beside] [the clock tower|the market stalls|the fountain]"),
    ("on a quiet farm", "the farm", "[behind|under|beside] [the red barn|a hay cart|the apple tree]"),
    ("in a big garden", "the garden", "[under|behind|beside] [a rose bush|the stone bench|a pile of leaves]"),
    ("on a small island", "the island", "[under|behind] [a palm tree|a black rock|an old net]"),
)
WONDERS = (
    ("Why is the sky blue?", "Because it looks at the sea all day long"),
    ("Where does the sun go at night?", "It goes to wake up the other side of the world"),
    ("Why do the stars shine?", "So that nobody gets lost in the dark"),
    ("What is the wind looking for?", "A window that somebody forgot to close"),
    ("Why does the moon change its shape?", "Because it gives a little of its light away each night"),
    ("How do birds know the way home?", "They listen to their hearts and follow the rivers"),
    ("What is the best thing in the world?", "A friend who waits for you"),
    ("Where do rivers go?", "They go to the sea to tell it what they have seen"),
    ("Why do leaves fall?", "They make a warm blanket for the seeds"),
    ("Who made the first song?", "Somebody who was happy and could not keep it inside"),
)
TITLES = "[The {kind} and the {thing}|{Hero} and the {thing}|A story about {hero}|{Hero} and {friend}]"
REQUESTS = "[Tell me|Write|Please tell me] a story about {a_kind}[| and {friend_a_kind}| and a {thing}]."

OPENINGS = """
Once upon a time[,|] there was {who} who lived {where}.
Once upon a time, {who} lived {where}.
Long ago, {who} lived {where}, [far from any road|not far from here|in a house with a blue door].
{Where}, there lived {who}.
{Where}, {who} had a [small|warm|tidy] house.
{The_hero} lived {where}. [{He} was happy there.|Everyone there knew {him}.|{He} liked to sing to {himself}.]
There was once {who}. {He} lived {where} and liked [to look at the stars|to read old books|the smell of rain].
[{Hero}|{The_hero}] had a {thing}. [It was the thing {he} loved most.|It was old, but {he} loved it.]
Every [morning|evening], {the_hero} [walked around {place}|sat still and listened|swept the floor and made some tea].
"I wonder what will happen today," said {the_hero}, looking out over {place}.
"[What a fine day|Good morning]," said {the_hero}. [Nobody answered.|Only the wind answered.]
The people who lived {where} often talked about {who}.
It all began {where}, in the house of {who}.
This is the story of {who} who lived {where}.
Have you ever heard of {who}? {He} lived {where}.
A long time ago, when the world was young, {who} lived {where}.
In a land far away, {where}, there lived {who}.
Nobody knew where {the_hero} came from. {He} just lived {where}[ and never spoke of it|, in a very small house].
When the sun came up over {place}, {the_hero} was already awake.
"""
MOMENTS = """
One {when}, {who} was walking {where}.
One {when}, {the_hero} [put on {his} hat|could not sit still] and looked out of the window.
It was a {when}, and {who} was [sitting by the window|resting|humming a song|drinking tea].
It was a {when} {where}. {The_hero} [had nothing to do|was making tea|was looking at the clouds].
"""
ENDINGS = """
The end.
And that is how [it all ended|the story ends].
And if you go [there|to {place}] today, you may still hear [them laugh|them singing|that story].
"Tomorrow," said {hero}, "we will do it all again."
That night, {hero} slept [well|very well], and {his} dreams were [warm|sweet|full of light].
From that day on, {hero} and {friend} were the best of friends.
{Hero} and {friend} [stayed friends for many years|walked home side by side|told this story many times].
"""

STORIES = {
    "lost and found": """
{one_day}{hero} could not find {his} {thing}.
{one_day}{hero} [lost {his} {thing} on the way home|reached into {his} bag, but {his} {thing} was gone].

{He} looked {spot}, but there was [nothing there|only dust|only a sleepy beetle].
{He} looked [everywhere|high and low], even {spot}, but [it was not there|{he} found nothing].
"Where can it be?" {he} [whispered|wondered|sighed], and {he} looked {spot}.

Just then {a_friend} came [by|along|down the path]. "What is wrong?" asked {friend}.
{A_friend} [heard {him} sigh|saw {him}] and stopped. "Can I help you?" asked {friend}.

"I have lost my {thing}," said {hero}. "It was a gift from my [grandmother|father|mother|best friend]."
"My {thing} is gone," said {hero} [sadly|in a small voice], "and I do not know where to look."

They [looked|searched] together, [step by step|side by side], until {friend} saw something {spot2}.
"Let us go back the way you came," said {friend}. [Soon|After a while] they saw something {spot2}.

It was the {thing}! {Hero} [laughed and hugged {friend}|jumped for joy|could not stop smiling].
There lay the {thing}, a little [dusty|wet] but not broken. "Thank you, {friend_call}," said {hero}.

"Two pairs of eyes see more than one," said {friend}.
After that, {hero} always kept the {thing} in a safe place.
""",
    "making a friend": """
{one_day}{hero} felt lonely, so {he} [went for a walk|packed a small bag and set out].
{one_day}{hero} was [humming a song|counting the clouds] when {he} heard a [small|soft] voice.

{A_friend} was sitting {spot}[, all alone|, looking at the sky|]. "Hello," said {hero}.
{Spot} sat {a_friend}. "[May I sit here|Would you like some company]?" asked {hero}.

"I am new here," said {friend}. "I do not know anyone [yet|in this place]."
{Friend} looked at the ground and did not say a word. {Friend_he} was very shy.

{Hero} took out {his} {thing}. "Would you like to [see it|hold it|try it]?" {he} asked.
So {hero} sat down and showed {friend} {his} {thing}.

{Friend} smiled for the first time that day. "It is [beautiful|wonderful]," {friend_he} said.
"I have never seen such a fine {thing}," said {friend}, and {friend_his} eyes [shone|grew wide].

They [talked|played|laughed] until [the sun went down|the first star came out|it was time for supper].
All day long they [told each other stories|ran up and down {place}|played and sang].

"Will you come back tomorrow?" asked {friend}. "Of course," said {hero}. "That is what friends do."
When {hero} went home, {he} did not feel lonely any more.
""",
    "a journey": """
{one_day}{hero} found [an old letter|a note] {spot}. It said, "Come to {place2}. Somebody is waiting."
{one_day}{hero} decided to [go|travel] to {place2}, because {he} had never been there before.

{He} packed {food_a}, a blanket and {his} {thing}, and {he} closed the door behind {him}.
{He} put {his} {thing} in a bag and set out [before breakfast|at once|with a song].

The road was long. [On the second day|At a bridge|Near a wood], {he} met {a_friend}.
After many hours {he} came to a [bridge|crossroads], and there stood {a_friend}.

"Where are you going?" asked {friend}. "To {place2}," said {hero}. "Then I will come with you," said {friend}.
"Is this the way to {place2}?" asked {hero}. "It is," said {friend}, "but it is better to walk with a friend."

They crossed a [cold stream|dark wood|high hill], and when {hero} was tired, {friend} carried the bag.
At night they shared {food_a} by a small fire and counted the stars.

[At last|On the third day] they came to {place2}. {The_elder} was waiting there. "Welcome," said {elder}.
When they reached {place2}, {a_elder} opened the door and said, "I hoped that somebody would come."

"The best part of a journey is the one who walks beside you," said {elder}.
They stayed for a week, and when they went home, the road felt short.
""",
    "an invention": """
{one_day}{hero} had an idea. {He} wanted to build a {invention}.
{one_day}{hero} said, "I will build a {invention}!" Everyone laughed.

{He} took [two springs|a wheel|three bottles], [a spoon|an old shoe|a tin can] and [a piece of string|a box of nails].
{He} worked all day and [half the night|did not even stop to eat].

But when {he} tried it, the {gadget} only [coughed|shook a little|made a sad noise] and stopped.
The first {gadget} fell apart. The second one was [worse|no better].

"Why are you so sad?" asked {a_friend}. "It does not work," said {hero}.
{A_friend} came to look. "May I?" asked {friend}, and {friend_he} walked slowly around the {gadget}.

"I think this part is upside down," said {friend}. {Hero} looked again. {Friend} was right.
{Friend} gave {him} a {thing}. "Try this," {friend_he} said. It fitted perfectly.

This time it worked. It was [truly|really] a {invention}! They danced around it and cheered.
There was a click and a hum, and then everyone could see it: a {invention}.

"I could not have done it alone," said {hero}. "Nobody can," said {friend}.
Soon everybody [wanted one|came to see it], and {hero} taught them how to build it.
""",
    "a storm": """
{one_day}dark clouds came over {place}, and {hero} [heard thunder far away|felt the first drops of rain].
{one_day}a great storm came to {place}. The wind [howled|blew so hard that the windows shook].

{He} closed the windows, lit a lamp and [sat down by the fire|made a pot of tea].
{He} ran home as fast as {he} could and shut the door.

Then there was a knock. {A_friend} stood outside, [cold and wet|shaking with cold].
Then {he} heard a cry. {A_friend} was caught in the rain {spot}.

"Come in, come in!" said {hero}. {He} gave {friend} a warm blanket and {food_a}.
{Hero} did not think twice. {He} took {friend} by the hand and led {friend_him} inside.

"Are you not afraid of the thunder?" asked {friend}. "A little," said {hero}, "but less when you are here."
They told stories [all night|until the lamp burned low], and the thunder did not seem so loud.

In the morning the sky was [clear|blue and clean], and a rainbow stood over {place}.
When they woke up, the storm was over. [Everything smelled of rain.|The birds were singing.]

"Thank you for opening the door," said {friend}. "It is always open for you," said {hero}.
{Friend} gave {hero} a {thing} to say thank you, and {he} [kept it|treasured it] for the rest of {his} life.
""",
    "sharing food": """
{one_day}{hero} [baked|made|bought] {food_a}, and it smelled [wonderful|so good].
{one_day}{hero} had {food_a} for lunch. It was all the food {he} had.

{He} was just about to [eat|take the first bite] when {a_friend} came by.
{He} sat down {spot} to eat. Then {he} saw {a_friend} [nearby|looking at the {dish}].

"I have not eaten since yesterday," said {friend} [quietly|in a low voice].
"That smells good," said {friend}, and {friend_his} stomach [growled|made a loud noise].

{Hero} looked at the {dish}, and then {he} looked at {friend}. "There is enough for two," {he} said.
At first {hero} wanted to keep it all. But then {he} [smiled|felt sorry], and {he} pushed the {dish} across.

They ate [slowly|together], and somehow it tasted better than ever.
{Friend} took a small bite. "This is the best meal in the world," {friend_he} said.

The next day, {friend} came back with {food2_a}. "Now it is my turn," {friend_he} said.
A week later {hero} found {food2_a} at the door, with a note that said, "Thank you."

"Food tastes best when you share it," said {hero}.
And so every [Sunday|evening] they ate together.
""",
    "a question": """
{one_day}{hero} had a question. "{question}" {he} asked.
{one_day}{hero} looked up and asked {himself}, "{question}"

{He} asked {a_friend}, but {friend} did not know. "Let us ask {the_elder}," said {friend}.
"I do not know," said {a_friend}. "But {the_elder} knows many things."

So they [walked to {place2}|went all the way to {place2}], where {a_elder} lived.
They found {the_elder} {spot_there}, [half asleep|drinking tea|reading a book].

"{question}" asked {hero}. {Elder} thought for a long time.
{Elder} listened and nodded. "That is a very good question," {elder_he} said.

"{answer}," said {elder} at last.
"{answer}," said {elder} with a smile.

{Hero} and {friend} were quiet for a while. Then they both smiled.
"I think that is true," said {hero}. "Now I have ten more questions!"

"Never stop asking," said {elder}.
On the way home, {hero} looked at {place} as if {he} saw it for the first time.
""",
    "afraid of the dark": """
One [cold|quiet|windy] night, the light went out, and {hero} could not sleep. {He} was afraid of the dark.
One [dark|quiet|windy] night, {hero} heard a strange noise outside. Tap, tap, tap.

"Who is there?" {he} called. Nobody answered. [Tap, tap, tap.|There was only the wind.]
{He} pulled the blanket over {his} head, but the noise did not stop.

At last {he} was brave. {He} took {his} {thing} and [went outside|opened the door a little].
{He} counted to three, [took a deep breath|held {his} {thing} tightly] and opened the door.

{Spot}, {he} found {a_friend}. "I am sorry," said {friend}. "I cannot sleep. I am afraid of the dark."
It was only {a_friend}. "Did I wake you?" asked {friend}. "I am lost, and it is so dark."

{Hero} laughed. "I was afraid too," {he} said. "Let us be brave together."
"Sit with me," said {hero}. "The dark is not so big when there are two of us."

They looked at the stars and gave each one a name.
They sat side by side and listened to the night. It was not scary at all. It was [beautiful|full of music].

When the sun came up, they were both fast asleep.
After that night, {hero} was never afraid of the dark again.
""",
    "a seed": """
{one_day}{a_elder} gave {hero} a tiny seed. "[Be patient|Take care of it|Plant it and wait]," said {elder}.
{one_day}{hero} found a strange [blue|golden|silver] seed {spot}.

{He} put it in the ground and gave it water every [day|morning].
{He} planted it in {his} best pot and sat down to wait.

A week went by, and nothing happened. "[Perhaps it is asleep|I must have done something wrong]," said {hero}.
Every day {he} looked, and every day there was [nothing|only dirt].

"Give it time," said {a_friend}. "[Good things grow slowly|It will grow when it is ready]."
{A_friend} came to see. "Did you ever sing to it?" asked {friend}. So they sang to it every evening.

Then, one morning, there was a small green leaf. {Hero} [shouted with joy|ran to tell {friend}].
In spring it came up at last, and it grew and grew until it was [taller than {hero}|as tall as a house].

It had [red|golden|blue] flowers that [smelled of honey|shone at night|rang like bells].
In summer it was full of sweet [pears|plums|cherries], enough for everyone.

"You see," said {friend}, "it was worth the wait."
{Hero} kept one seed, and {he} gave it to [a child|a stranger] who was just passing by.
""",
    "learning": """
{one_day}{hero} wanted to learn to {skill}, and {a_friend} [wanted|promised] to help.
{one_day}{hero} saw {a_friend} {skill}. "I want to do that too," {he} said.

{He} tried once, and {he} fell [over|into a puddle]. {He} tried again, and it was [worse|no better].
But it was [hard|not easy at all]. After the first try, {he} was [covered in mud|sad and tired].

"I will never learn to {skill}," {he} [said|cried] and sat down {spot}.
"I cannot do it," {he} said to {friend}. "I give up."

"I fell a hundred times," said {friend}. "The trick is to get up a hundred and one times."
{Friend} sat down next to {him}. "You are not bad at it," {friend_he} said. "You are only new at it."

So {hero} tried again, day after day, and {friend} [helped|stayed with {him}].
The next morning {he} got up early and tried again, and again, and again.

And then, one [morning|evening], {he} could do it! {He} could really {skill}!
After a week {he} could {skill} a little. After a month {he} could {skill} better than anyone {he} knew.

"I knew you could do it," said {friend}.
{Hero} was so proud that {he} told everyone {he} met.
""",
    "something broken": """
{one_day}{hero} dropped {his} {thing}, and it broke.
{one_day}{hero} borrowed a {thing}, and by accident {he} broke it.
{one_day}there was a loud crash. {Hero} looked down. {His} {thing} was in pieces.

{He} wanted to hide it {spot}, but that did not feel right.
{He} picked up the pieces one by one, and a tear ran down {his} nose.

So {he} went to {a_friend} and told {friend_him} the truth. "I am sorry," {he} said.
"What shall I do?" {he} asked {a_friend}. "Tell me everything," said {friend}.

{Friend} looked at the pieces. "[Things break|It happens to all of us]," {friend_he} said. "We can mend it."
"I am glad that you told me," said {friend}. "Come, let us mend it together."

They worked all [afternoon|evening] with glue, [thread|wire] and a lot of [care|patience].
They took it to {the_elder}, who could mend anything. {Elder} hummed and worked for an hour.

When it was done, one [fine|golden] line could still be seen. "It is prettier than before," said {hero}.
At last the {thing} was whole again, and {hero} [clapped|smiled from ear to ear].

"The truth is the best glue," said {friend}.
{Hero} never forgot how kind {friend} had been.
""",
    "a birthday": """
{one_day}it was the birthday of {hero}, but nobody said a word about it.
{one_day}{hero} woke up and remembered that it was {his} birthday.

"[Perhaps they all forgot|It does not matter]," {he} said, but it made {him} [sad|feel very small].
{He} went outside, but there was nobody to be seen. The whole place was [empty|silent].

Then {he} saw a [red|blue|golden] ribbon {spot}. {He} followed it, step by step.
{Spot} {he} found a note. "Follow the [candles|paper stars]," it said.

At the end stood {a_friend} with {food_a}. "Happy birthday!" {friend_he} shouted.
Suddenly {a_friend} jumped out with {food_a} and laughed. "Did you think that I forgot?" asked {friend}.

There was music, and there were lights in every tree. {The_elder} had come too.
{Friend} gave {him} a small box. In the box was a {thing}.

"It is the best birthday of my life," said {hero}, and {he} [meant it|hugged {friend}].
They [danced|sang|ate] until midnight, and nobody wanted to go home.
""",
    "a race": """
{one_day}there was a great race, and {hero} wanted to win it. {A_friend} only wanted to run.
{one_day}{hero} met {a_friend}. "I am faster than you," said {friend}. "Let us see," said {hero}.

Everyone came to watch. [One, two, three, go!|A bell rang, and they ran.]
{Hero} ran as fast as the wind. Soon {he} was [first|far ahead].

But half way {he} heard a cry. It was {friend}, who had fallen {spot}.
Then {he} looked back. {The_friend} was sitting {spot}, holding one foot.

{Hero} stopped. {He} thought of the prize, a {thing}. Then {he} turned around.
"If I stop now, I will lose," {he} thought. But {he} stopped.

"[Lean|Hold on] to me," {he} said, and they walked to the end together, slowly, side by side.
{He} helped {friend_him} up. "You will not win now," said {friend}. "I know," said {hero}.

They came in last, and everybody cheered for them as if they had won.
{The_elder} gave them the prize. "You are both winners," {elder_he} said.

"Next year," said {friend}, "we will run as a team."
{Hero} never won a race, but {he} won a friend.
""",
    "a fallen star": """
One [clear|cold|quiet] night, {hero} saw a star fall from the sky. It came down {spot}.
One [clear|cold|quiet] night, {hero} found a small light {spot}. It was a star that had fallen from the sky.

"Are you hurt?" {he} asked. "No," said the star, "but I want to go home."
It was as small as a [button|nut], and it was crying. "I am so far from home," said the star.

{Hero} put the star in {his} pocket and went to see {a_friend}, who was very wise.
{He} showed the star to {a_friend}. "We must help it," said {friend} at once.

First they tried a ladder, but it was too short. Then they tried a kite, but the wind was too [weak|wild].
They climbed to the top of the highest tower, but the sky was still [far away|too high].

"What does a star need to fly?" asked {hero}. "A song," said the star. "Nobody sings to me here."
Then {friend} had an idea. "Stars are made of wishes," {friend_he} said. "Let us make a wish."

So they [sang|wished with all their hearts], and the star rose up, higher and higher, until it was home.
They closed their eyes. When they opened them, the star was [back in the sky|shining over {place}].

Every night it shines [a little brighter|right over {place}], just for {hero} and {friend}.
"Good night, little star," said {hero}, and the star winked.
""",
    "two friends": """
{one_day}{hero} and {a_friend} were neighbours, and they did everything together.
{one_day}{hero} and {a_friend} found a {thing} {spot}.

But one day they both wanted the same {thing}. "It is mine!" said {hero}. "No, mine!" said {friend}.
"I saw it first," said {hero}. "But I picked it up," said {friend}. They began to argue.

They did not speak for [three days|a week]. {Hero} walked alone, and {friend} walked alone.
{Friend} went home and shut the door. {Hero} had the {thing} now, but {he} was not happy.

"What good is a {thing} without a friend?" thought {hero}.
{Hero} asked {the_elder} for help. "Which one do you miss more," asked {elder}, "the {thing} or {friend}?"

So {he} knocked on the door. "I am sorry," {he} said. "I am sorry too," said {friend}.
In the morning they met on the road, and both began to speak at once. Then they laughed.

From then on the {thing} stayed one week with {hero} and one week with {friend}.
They gave the {thing} to [a child|a stranger] who had nothing, and they felt rich.

"A thing is only a thing," said {friend}, "but a friend is a friend."
And they never argued again, or at least [not for long|not about that].
""",
}
CUES = {
    "lost and found": words("foggy town mouse crow girl librarian"),
    "making a friend": words("lonely forest island shy owl penguin"),
    "a journey": words("sea mountains sailor boy duck astronaut"),
    "an invention": words("robot wizard painter badger"),
    "a storm": words("rainy windy lighthouse fisherman shepherd"),
    "sharing food": words("cold farm baker bear squirrel farmer"),
    "a question": words("desert curious princess cat teacher"),
    "afraid of the dark": words("dragon night rabbit prince"),
    "a seed": words("spring garden gardener hedgehog frog"),
    "learning": words("river young turtle goat"),
    "something broken": words("clockmaker clever dog"),
    "a birthday": words("village king queen"),
    "a race": words("summer fox sunny brave"),
    "a fallen star": words("moon quiet winter witch"),
    "two friends": words("autumn otter cheerful warm"),
}
"""Times, places and people that make a plot more likely: the beginning of a story hints at what follows."""
SKILLS = ("swim", "dance", "whistle", "ride a bicycle", "play the violin", "skate on the ice", "climb trees", "juggle")
HELLO = """
[Hello|Hi|Good morning]! My name is {own_name}, and I am {a_kind}. I live {where}.
My name is {own_name}. I am {a_kind}, and I live {where}.
I am {a_kind}, and my name is {own_name}. My home is {where}.

My best friend is {a_friend}. We [walk|sing|play] together every day.
Every morning I drink tea and look at my {thing}.

I like [stories|rain|long walks], and in the evening I [eat|share] {food_a}.
Would you like to hear a story? I know [many|a very good one].
"""
FACTS = (
    "Question: {question}\nAnswer: {answer}.",
    "{question} {answer}.",
    '"{question}" asked {the_hero}. "{answer}," said {the_friend}.',
)
JUNK = "0123456789 .,:;!?-_=+*/()[]{}<>#@&%$^~|\\'\"éüñßøżабвгд你好世界日本語안녕안αβγ😀🎉🐉🚀❤️👩‍🚀✨\n\tqxzjkv"
SYLLABLES = words("ba ka lo mi ru ta ne so vi da fe gu ha jo ki la mo na pi ra su te wa yo za el in or an us")
COMMON_WORDS = words("""
the of and to in is that for it as with on are this be at by have from or one had not but what all were when we there
can your which their if do will each about how up out them then many some so these would other into has more two like
see time could no make than first been who now people my made over did down only way find may water long very after
called where most know explain write describe list please name capital country computer number why tell does work model
""")
