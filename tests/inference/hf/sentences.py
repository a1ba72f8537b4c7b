"""A hundred texts in many languages and scripts: short, long, odd, and longer than most models read."""

LINES = """\
The quick brown fox jumps over the lazy dog.
How do I read a file line by line in Python?
Open the file with open() and iterate over it; each iteration yields one line.
The committee postponed its decision until the beginning of next year.
Rain is expected in the north, with sunny spells towards the evening.
She sold sea shells by the sea shore, and he bought none of them.
What is the capital of Australia?
Canberra, not Sydney, is the capital of Australia.
A gradient tells in which direction a function grows fastest.
Colourless green ideas sleep furiously.
It's 5 o'clock somewhere, isn't it? "Yes", he said - 'twas time.
Le chat est assis sur le tapis et regarde par la fenêtre.
Où se trouve la gare la plus proche, s'il vous plaît ?
L'été dernier, nous avons traversé les Alpes à vélo.
Der Zug nach München fährt heute von Gleis sieben ab.
Die Straße wurde wegen Überschwemmung vollständig gesperrt.
Donaudampfschifffahrtsgesellschaftskapitän
¿Dónde puedo comprar un billete de ida y vuelta?
El niño comió una manzana roja en el jardín de su abuela.
Mañana por la mañana saldremos hacia la montaña.
O menino correu até à praia para ver o pôr do sol.
A ação começou às três horas da manhã.
Il treno parte alle otto e un quarto dal binario due.
Perché il cielo è blu e il mare no?
De kat zit op de vensterbank en kijkt naar buiten.
Smörgåsbordet var dukat med sill, ägg och knäckebröd.
Blåbærsyltetøy på rugbrød er godt til frokost.
Sää on tänään kylmä, mutta aurinko paistaa kirkkaasti.
Zażółć gęślą jaźń.
Wczoraj wieczorem poszliśmy do teatru na nową sztukę.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Árvíztűrő tükörfúrógép
Bugün hava çok güzel, İstanbul'da deniz sakin.
Trời hôm nay đẹp quá, chúng ta đi dạo nhé.
Ĉiuj homoj estas denaske liberaj kaj egalaj laŭ digno kaj rajtoj.
Ég á heima í Reykjavík og þar er oft hvasst.
Mae'r gath yn eistedd ar y silff ffenestr.
Visi cilvēki piedzimst brīvi un vienlīdzīgi savā pašcieņā.
Saya suka membaca buku di perpustakaan pada akhir pekan.
Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.
Съешь же ещё этих мягких французских булок, да выпей чаю.
Завтра мы поедем за город, если не будет дождя.
Жебракують філософи при ґанку церкви в Гадячі.
Бързата кафява лисица прескача мързеливото куче.
הילד אכל תפוח אדום בגינה של סבתא שלו.
القطة تجلس على النافذة وتنظر إلى الخارج.
أين يمكنني شراء تذكرة القطار؟
گربه روی فرش نشسته است.
बिल्ली खिड़की पर बैठी है और बाहर देख रही है।
আমি ভাত খেতে ভালোবাসি।
பூனை ஜன்னலில் அமர்ந்திருக்கிறது.
แมวนั่งอยู่บนหน้าต่างและมองออกไปข้างนอก
猫坐在窗台上看着外面的雨。
我想买一张去北京的火车票。
學而時習之,不亦說乎?
猫は窓辺に座って外を眺めている。
すみません、駅はどこですか？
東京タワーは1958年に完成しました。
고양이가 창가에 앉아 밖을 내다보고 있다.
내일 아침에 서울로 가는 기차표를 사고 싶어요.
საქართველოს დედაქალაქია თბილისი.
Հայաստանի մայրաքաղաքը Երևանն է։
በአዲስ አበባ ዛሬ ዝናብ ነው።
Ni dhahiri kwamba mvua itanyesha kesho asubuhi.
for (int i = 0; i < n; ++i) sum += array[i];
SELECT name, COUNT(*) FROM users GROUP BY name HAVING COUNT(*) > 1;
<a href="https://example.org/?q=1&amp;r=2">link</a>
x = [i ** 2 for i in range(10) if i % 2 == 0]  # squares of even numbers
snake_case_name, camelCaseName, SCREAMING_CASE, kebab-case-name
/usr/local/lib/python3.11/site-packages/torch/nn/functional.py
https://arxiv.org/abs/1706.03762v7
E = mc², ∫ f(x) dx ≈ Σ fᵢ Δx, ∀ε>0 ∃δ>0
3.14159265358979323846264338327950288419716939937510
1,234,567.89 € + £42 − ¥1000 = ?
+49 (0)89 123456-78, 2024-02-29T23:59:60Z
😀 😃 😄 👩‍👩‍👧 🏴‍☠️ 🇩🇪 👍🏽
☃ ♥ ♫ ✓ ✗ → ← ⇒ ∞
...!!!???...
a
A
é
ﬁﬂ ﷺ ㎞ Ⅷ ½
ＦＵＬＬ　ＷＩＤＴＨ
supercalifragilisticexpialidociouspneumonoultramicroscopicsilicovolcanoconiosis
Mixed: Привет, 世界! Γειά σου, κόσμε — שלום עולם, مرحبا بالعالم.
""".splitlines()
ODD = [
    "def add(a, b):\n    return a + b", "e\u0301", "zero\u200bwidth\u00adsoft\u2060joined", "",
    "tab\tand\nline breaks\r\nof two kinds", "\0control\acharacters\ufffd", " \n ", "word " * 400,
]  # fmt: skip
LONG = [" ".join(LINES[start : start + 11]) for start in range(0, 40, 7)] + [" ".join(LINES[:50])]
SENTENCES = LINES + ODD + LONG
