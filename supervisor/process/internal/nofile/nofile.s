// This file is empty. It lets the package declare a function without a body.
