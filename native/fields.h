// Which members of a struct come from Python, in the order of the arguments.
#pragma once

namespace secateur {

template <auto... members> struct Fields { template <auto... more> using And = Fields<members..., more...>; };

}  // namespace secateur
